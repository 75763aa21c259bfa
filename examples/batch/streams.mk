# One model per stream, as a batch job: as many at once as `make -j` says.
#
#   make -f examples/batch/streams.mk -j2 RUN=run.h5 TEST=test.h5 STREAMS="monday.h5 tuesday.h5" OUT=models
#
# A stream's model appears whole or not at all, so an interrupted batch goes on where it stopped when make runs again;
# a stream that was under way goes on from its checkpoint. OUT/accuracy.csv has a line per stream.
RUN     ?= run.h5
TEST    ?= test.h5
STREAMS ?= $(wildcard streams/*.h5)
OUT     ?= models
FILTER  ?= --window 100 --keep 30
SELECT  ?= --batch 10
TRAIN   ?=

SHELL       := bash
.SHELLFLAGS := -o pipefail -c
NAMES       := $(basename $(notdir $(STREAMS)))
MODELS      := $(NAMES:%=$(OUT)/%.h5)
VPATH       := $(sort $(dir $(STREAMS)))

.PHONY: all
.DELETE_ON_ERROR:
all: $(OUT)/accuracy.csv

$(OUT):
	mkdir -p $@

$(MODELS): $(OUT)/%.h5: %.h5 $(RUN) | $(OUT)
	@state=$(OUT)/.$*; resume=; mkdir -p $$state; \
	if [ -f $$state/check.h5 ]; then resume="--resume $$state/check.h5"; else rm -rf $$state/live; fi; \
	cat $(RUN) $< | edgetrain run "filter $(FILTER) -q | select $(SELECT) --live $$state/live $$resume -q | \
		train-sparse $(TRAIN) --live $$state/live --checkpoint $$state/check.h5 --checkpoint-every 20 $$resume \
		-q -o $@" && rm -rf $$state

$(OUT)/accuracy.csv: $(MODELS) $(TEST)
	@echo stream,accuracy > $@.part
	@for name in $(NAMES); do \
		edgetrain evaluate $(OUT)/$$name.h5 $(TEST) --json -q | \
			python3 -c "import json, sys; print('$$name', json.load(sys.stdin)['accuracy'], sep=',')" >> $@.part || exit 1; \
	done
	@mv $@.part $@
	@cat $@
