# make demo: environment, install, the demo.   make test: environment, install, tests.   make check: lint, types, imports, sizes.
# make coverage: tests, and the lines that none of them runs.   make bench: ops against eager, compiled eager and a copy.
# make docs: the site, in site/.   make docs-browser: the site and a gallery in a headless Chromium.   make examples: every script in examples/ (FULL=1: in full size).
# make paper: the comparison of methods, hours on a CPU; with QUICK=1 a small version, with DEVICE=cuda on a GPU.
# make wheel: builds a wheel, checks it, runs README's example in an empty environment with it.
# make sanitize: the kernels' tests under AddressSanitizer and UBSan.   make matrix: what of the matrix of Pythons can run here.
# make fuzz: the readers of files, SECONDS_EACH seconds for each.   make audit: known vulnerabilities in what the package depends on.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DOCS   := .venv-docs
TOOLS  := .venv-release

.PHONY: demo test check coverage bench paper docs docs-browser examples wheel sanitize fuzz matrix audit install clean

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

# What is done is kept in PAPER, so that the same command goes on where it was stopped.
DEVICE ?= cpu
PAPER  ?= build/paper$(if $(QUICK),-quick)
paper: $(READY)
	$(BIN)/python -m bench.paper run --out $(PAPER) --device $(DEVICE) $(if $(QUICK),--quick)
	$(BIN)/python -m bench.paper report $(PAPER) --to $(PAPER)

# In an environment of its own, because nothing is imported for it: seconds in place of torch's minutes.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build
	$(DOCS)/bin/python .ci/check_site.py site

# CHROMIUM=/path chooses the browser. Its pictures of all pages are in build/screenshots, to be looked at.
docs-browser: docs $(READY) .venv-browser/.ready
	$(BIN)/doodl-fast sweep --out build/sweep --set 'prompts=["a red star", "a blue circle"]' --set seeds=2 \
	  --set 'guides=["clip-text"]' --set 'methods=["none", "ddim"]' --set options.model=shapes --set options.steps=6 \
	  --set options.optimization_steps=4
	.venv-browser/bin/python .ci/check_browser.py site build/sweep/gallery.html --screenshots build/screenshots

# The requirements of the extra of that name alone, without the package and torch.
.venv-%/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q --upgrade pip
	.venv-$*/bin/python .ci/requirements.py $* > .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install -q -r .venv-$*/requirements.txt
	touch $@

wheel: $(READY) $(TOOLS)/.ready
	rm -rf dist build/lib* build/bdist* build/temp*
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .
	ls -l dist
	case "$$(uname)" in Linux) $(TOOLS)/bin/auditwheel show dist/*.whl;; esac
	$(TOOLS)/bin/abi3audit --strict --verbose dist/*.whl
	.ci/check_wheel.sh $(BIN)/python dist/*.whl

sanitize: $(READY)
	.ci/sanitize.sh $(BIN)/python

# With atheris, if it is in the environment; otherwise sound files are changed at random.
SECONDS_EACH ?= 20
fuzz: $(READY)
	set -e; for target in picture lattice_state run_state; do \
	  $(BIN)/python fuzz/run.py $$target --seconds $(SECONDS_EACH); done

# Sessions that need another torch are not among these: `.venv-release/bin/nox -l` lists them, and what they are for.
matrix: $(TOOLS)/.ready
	$(TOOLS)/bin/nox -s syntax docs

audit: $(READY) $(TOOLS)/.ready
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable | sed '/^torch==/s/+cpu//; / @ /d' > build/frozen.txt
	$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip -r build/frozen.txt

# One after the other; pictures are in examples/out. The LoRA is trained with fewer pictures and steps than by default, and
# fewer regularisers are compared; `make examples FULL=1` does both as docs/weights.md and docs/rewards.md report.
ifndef FULL
SMALL_lora_from_reward := --batch 8 --training-steps 10 --learning-rate 3e-3 --held-out 40 --out examples/out/small_lora
SMALL_reward_hacking := --prompts 4 --rows 0 1 3 --out examples/out/small_reward_hacking
endif
examples: $(READY)
	set -e; $(foreach script,$(sort $(wildcard examples/*.py)),echo "== $(script)"; \
	  $(BIN)/python $(script) $(SMALL_$(basename $(notdir $(script))));)

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
	rm -rf $(VENV) $(DOCS) $(TOOLS) .venv-browser site dist .nox fuzz/found fuzz/corpus examples/out build *.egg-info demo doodl_fast/_native*
