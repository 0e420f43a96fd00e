# make demo: environment, install, the demo.   make test: environment, install, tests.   make check: lint, types, imports, sizes.
# make coverage: tests, and the lines that none of them runs.   make bench: ops against eager, compiled eager and a copy.
# make docs: the site, in site/.   make examples: every script in examples/.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DOCS   := .venv-docs

.PHONY: demo test check coverage bench docs examples install clean

demo: $(READY)
	$(BIN)/doodl-fast demo --out demo

test: $(READY)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_sizes.py

# Apart from `check`, which takes seconds. Processes that tests start are not measured.
coverage: $(READY)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --cov --cov-report=term-missing:skip-covered

bench: $(READY)
	$(BIN)/python bench/ops.py

# In an environment of its own, because nothing is imported for it: seconds in place of torch's minutes.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build
	$(DOCS)/bin/python .ci/check_site.py site

$(DOCS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -q --upgrade pip
	$(DOCS)/bin/python .ci/requirements.py docs > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install -q -r $(DOCS)/requirements.txt
	touch $@

# One after the other, each under a minute on an idle core; pictures are in examples/out.
examples: $(READY)
	set -e; for script in examples/*.py; do echo "== $$script"; $(BIN)/python $$script; done

install: $(READY)

# torch is pinned for development only: this release has a small CPU build for every platform
# setuptools is installed beforehand, and the build not isolated, so that setup.py finds torch's headers for the kernels
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q 'setuptools>=77'
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DOCS) site examples/out build *.egg-info demo doodl_fast/_native*
