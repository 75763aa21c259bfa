# Every target works from a fresh clone: the environment in .venv is made when it is missing or out of date.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
LIBRARY := stages/engines/native/libedgetrain.so

.PHONY: setup demo test test-all test-isa mutants check docs native native-test native-arm mcu bench bench-engine bench-device bench-native \
        bench-selection bench-pipeline bench-faults bench-mcu \
        reproduce-tinytrain-cost reproduce-tinytrain-accuracy reproduce-titan reproduce-related reproduce-forgetting reproduce-vit format clean help

help:            ## list the targets
	@grep -E '^[a-z-]+: *.*##' Makefile | sed 's/:.*##/\t/'

setup: $(READY)  ## make the environment in .venv

$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

demo: $(READY)   ## the whole toolkit on real data, in about three minutes
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

test: check native native-test  ## format, types and tests, with ten architectures of the zoo
	$(BIN)/python -m pytest -q

test-all: check native native-test native-arm mcu  ## the same with all architectures of the zoo, and the native engine on Arm
	$(BIN)/python -m pytest -q -m ""

# What torch and oneDNN take their kernels from; a processor that lacks one falls back to what it has.
ISAS := SSE41:default AVX2:avx2 AVX512_CORE:avx512

test-isa: $(READY)  ## the numerical tests under three instruction sets; TESTS=... for some of them
	@for isa in $(ISAS); do \
	    echo "== oneDNN $${isa%%:*}, ATen $${isa##*:}"; \
	    ONEDNN_MAX_CPU_ISA=$${isa%%:*} ATEN_CPU_CAPABILITY=$${isa##*:} $(BIN)/python -m pytest -q $(TESTS) || exit 1; \
	done

TESTS ?= $(filter-out tests/pipes/ tests/contracts/ tests/data/ tests/zoo/ tests/test_docs.py tests/test_examples.py,\
    $(wildcard tests/*/ tests/test_*.py))

mutants: $(READY)  ## which changes to the core no test notices: hours; MODULES=stages/... for some of it
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[mutants]"
	$(BIN)/python tests/mutants.py $(MODULES)

native: $(READY) $(LIBRARY)  ## the native engine's library, built again after a change of its sources

$(LIBRARY): $(wildcard stages/engines/native/c/*) | $(READY)
	$(BIN)/python setup.py --quiet build_ext --inplace

native-test: $(READY)  ## the C library alone: sanitizers, one buffer per value, damaged images
	PATH="$(abspath $(BIN)):$$PATH" sh tests/native/run.sh build/native-test

native-arm: native-test  ## the same bits on Arm, in an emulator; skipped where there is none
	sh tests/native/arm.sh build/native-test

mcu: native      ## exported programs train on an emulated Cortex-M7; skipped where there is none
	$(BIN)/python examples/bench/mcu.py --check

check: $(READY)  ## format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)   ## the generated pages: manual, library, schema
	$(BIN)/python tests/test_docs.py

format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-device bench-engine bench-native bench-selection bench-pipeline bench-faults bench-mcu  ## all benchmarks, written to docs/results

bench-device:    ## what the commands of a device hold and take
bench-engine:    ## what the sparse engine saves
bench-native:    ## the native engine beside the sparse engine in PyTorch
bench-selection: ## what choosing samples brings
bench-pipeline:  ## what choosing beside training costs: throughput, transport, memory
bench-faults:    ## 300 random faults in a live pipeline
bench-mcu:       ## exported programs on an emulated Cortex-M7: RAM, flash, instructions
bench-device bench-engine bench-native bench-selection bench-pipeline bench-faults bench-mcu: bench-%: $(READY)
	$(BIN)/python examples/bench/$*.py

reproduce-tinytrain-cost: $(READY)      ## every cell of TinyTrain's cost tables
	$(BIN)/python examples/reproduce/tinytrain_cost.py

reproduce-tinytrain-accuracy: $(READY)  ## TinyTrain's accuracy table on the data at hand; ARGS=--paper as published
	$(BIN)/python examples/reproduce/tinytrain_accuracy.py $(ARGS)

reproduce-titan: $(READY)               ## Titan's Table 1 on the data at hand
	$(BIN)/python examples/reproduce/titan.py

reproduce-related: $(READY)             ## what the systems beside TinyTrain claim, and what comes out
	$(BIN)/python examples/reproduce/related.py

reproduce-vit: $(READY)                 ## BSR, token dropping and plans by blocks on vision transformers
	$(BIN)/python examples/reproduce/vit.py

reproduce-forgetting: $(READY)          ## leaving out what is never forgotten, against everything and random parts
	$(BIN)/python examples/reproduce/forgetting.py

clean:           ## remove the environment, caches and the demo's output
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
