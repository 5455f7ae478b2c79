# One command each; everything they need is installed into .venv from this folder's own files.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: help setup check test test-slow bench bench-gpu demo docs release-check clean

help:
	@echo "make setup   install yoloxkd and its development tools into $(VENV)"
	@echo "make demo    plain and distilled student, ONNX, a picture: the whole way on a generated data set, in minutes"
	@echo "make check   lint, types, import floors"
	@echo "make test    the test suite, without what is slow"
	@echo "make test-slow   the tests that train or export for more than a few seconds"
	@echo "make docs    the documentation as a site, docs/_build/html/index.html"
	@echo "make release-check   sdist and wheel: built, installed in a clean environment, used from another folder"
	@echo "make bench   every claim about speed, measured; writes benchmarks/results.md (about 15 minutes on two cores)"
	@echo "make bench-gpu   the same for one GPU: steps, distillation, losses, a run (some 8 minutes)"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v.major}.{v.minor}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

check: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

test: setup  # a file's tests in one process: their runs and exported files are made once
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: setup
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile -m slow

bench: setup
	$(RUN)/python -m benchmarks.run

docs: setup
	$(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(RUN)/python -m sphinx --fail-on-warning --keep-going -b html docs docs/_build/html
	$(RUN)/python docs/check_links.py docs/_build/html

release-check: setup
	$(RUN)/python scripts/check_release.py

bench-gpu: setup
	$(RUN)/python -m benchmarks.gpu

demo: setup
	$(RUN)/python examples/demo.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
