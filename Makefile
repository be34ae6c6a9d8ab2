# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

export KINETO_LOG_LEVEL := 99
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check docs bench gpu gpu-test gpu-bench

help:
	@echo "make demo    fine-tune a small Llama with and without a byte budget, through both doors (about 3 minutes)"
	@echo "make test    the tests that take seconds each (about 14 minutes on two cores)"
	@echo "make test-slow  the others: several ranks, examples as programs, further models, most of what Inductor compiles"
	@echo "make check   ruff and mypy"
	@echo "make docs    the documentation, into build/docs/"
	@echo "make bench   all benchmarks that a CPU can run, printed and written to benchmarks/results/ (a night, most of it compiling)"
	@echo "make gpu     the tests and benchmarks that need an accelerator, with the python3 that is there and no set-up"
	@echo "              (gpu-test and gpu-bench: each of them alone)"
	@echo "make setup   only the set-up: .venv with the versions of constraints.txt"

setup: $(STAMP)

# torch first and by its own name: the pinned version decides which build comes, before anything else asks for torch.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed') if sys.version_info < (3, 10) else None"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not gpu and not slow"

test-slow: setup
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/absent.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/compiled.py
	$(BIN)/python benchmarks/compile_time.py
	$(BIN)/python benchmarks/reach.py
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/optimality.py
	$(BIN)/python benchmarks/frontier.py
	$(BIN)/python benchmarks/frontier_report.py
	$(BIN)/python benchmarks/order.py

gpu: gpu-test gpu-bench

gpu-test:
	PYTHONPATH=. $(PYTHON) -m unittest -v $(wildcard tests/gpu/test_*.py)

gpu-bench:
	PYTHONPATH=. $(PYTHON) -m benchmarks.prediction
	PYTHONPATH=. $(PYTHON) -m benchmarks.accelerator
	PYTHONPATH=. $(PYTHON) -m benchmarks.depth
