# make demo and make test are all the set-up there is. A CPU-only torch where the index has one:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow bench bench-gpu goals-gpu lint docs constraints clean

demo: $(VENV)/.installed
	$(RUN) recipes/demo.py

# One thread per worker: torch's own threads would fight over the cores. Files as tests/conftest.py
# orders them, where pytest-xdist would leave the long ones of few tests to the end.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m slow

bench: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest bench -q --benchmark-json bench.json
	$(RUN) bench/plot.py bench.json --out plots

# Both with the Python that has a CUDA build of torch, not the environment of the other targets.
# A case that fails must not keep the others from being drawn.
bench-gpu:
	-$(PYTHON) -m pytest bench -q --device cuda --full --goals none --memory-cap 100GiB \
		--time-budget 510 --benchmark-json gpu.json
	$(PYTHON) -m bench.results gpu.json --compact docs/plots/gpu.json
	$(PYTHON) bench/plot.py docs/plots/gpu.json --out plots-gpu

goals-gpu:
	$(PYTHON) -m bench.goals --device cuda --save docs/plots/goals-gpu.json \
		--into docs/goals.md

lint: $(VENV)/.installed
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m pyright

# mkdocs.yml makes every warning an error: a dead link, a page outside the navigation.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

$(VENV)/.installed: pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "attnzoo needs Python 3.10 or later; name one with PYTHON=python3.12"; exit 2; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || \
		{ echo "cannot make a virtual environment: install Python's venv module"; exit 2; }
	@echo "installing into $(VENV), about two minutes the first time"
# Everything but torch by its hash. torch, whose builds differ by index, brings its own packages.
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
		--require-hashes --no-deps --requirement requirements.lock
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
		--no-build-isolation --constraint constraints.txt --editable ".[dev]"
	@touch $@

# The first lines of both files say what they are.
constraints: $(VENV)/.installed
	$(RUN) -m pip install --quiet uv
	{ sed -n '/^#/p' constraints.txt; \
		$(RUN) -m uv pip compile --universal --python-version 3.10 pyproject.toml --extra dev \
		--no-header --no-annotate | grep -vE '^(nvidia|cuda)'; } > constraints.new
	mv constraints.new constraints.txt
	{ sed -n '/^#/p' requirements.lock; grep -v '^torch==' constraints.txt | \
		$(RUN) -m uv pip compile --universal --python-version 3.10 - --no-deps --generate-hashes \
		--no-header --no-annotate; } > requirements.new
	mv requirements.new requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info
