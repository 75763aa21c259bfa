# Every target works from a fresh clone: the environment in .venv is made when it is missing or out of date.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo test check docs bench bench-engine bench-selection bench-pipeline bench-faults \
        reproduce-tinytrain-cost reproduce-tinytrain-accuracy reproduce-titan format clean help

help:            ## list the targets
	@grep -E '^[a-z-]+: *.*##' Makefile | sed 's/:.*##/\t/'

setup: $(READY)  ## make the environment in .venv

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

demo: $(READY)   ## the whole toolkit on real data, in about three minutes
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

test: check      ## format, types and all tests
	$(BIN)/python -m pytest -q

check: $(READY)  ## format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)   ## the generated pages: manual, library, schema
	$(BIN)/python tests/test_docs.py

format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-engine bench-selection bench-pipeline bench-faults  ## all benchmarks, written to docs/results

bench-engine:    ## what the sparse engine saves
bench-selection: ## what choosing samples brings
bench-pipeline:  ## what choosing beside training costs: throughput, transport, memory
bench-faults:    ## 300 random faults in a live pipeline
bench-engine bench-selection bench-pipeline bench-faults: bench-%: $(READY)
	$(BIN)/python examples/bench/$*.py

reproduce-tinytrain-cost: $(READY)      ## every cell of TinyTrain's cost tables
	$(BIN)/python examples/reproduce/tinytrain_cost.py

reproduce-tinytrain-accuracy: $(READY)  ## TinyTrain's accuracy table on the data at hand; ARGS=--paper as published
	$(BIN)/python examples/reproduce/tinytrain_accuracy.py $(ARGS)

reproduce-titan: $(READY)               ## Titan's Table 1 on the data at hand
	$(BIN)/python examples/reproduce/titan.py

clean:           ## remove the environment, caches and the demo's output
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
