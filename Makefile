# make demo        sets up and does the main job: pretrains, compares, writes runs/demo/report.html
# make test        sets up and passes the tests; ENV=torch211 or ENV=pascal: those that another torch could break
# make test-gpu    the tests marked `gpu`, with $(PYTHON) and its own torch: nothing is installed
# make sanitize-gpu  memcheck and racecheck of the small kernel tests (compute-sanitizer is part of the CUDA toolkit)
# make bench-gpu   times the ops, with $(PYTHON) likewise, and writes benchmarks/results/ops-*; ARGS="--op info_nce"
PYTHON ?= python3
# Not from the environment, where ENV is the name of a shell's start-up file.
ENV := current

ENVS := $(patsubst requirements/%.txt,%,$(wildcard requirements/*.txt))
ifeq ($(filter $(ENV),$(ENVS)),)
$(error ENV=$(ENV) must be one of: $(ENVS))
endif

ifeq ($(ENV),current)
VENV := .venv
TESTS :=
else
VENV := .venv-$(ENV)
TESTS := tests/ops tests/trainer/test_environment.py
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
AT_HAND := PYTHONPATH=.:kernels $(PYTHON)

.PHONY: demo test test-gpu sanitize-gpu bench-gpu lint format clean

demo: $(STAMP)
	$(BIN)/ccmim demo --overwrite

test: $(STAMP)
	$(BIN)/pytest $(TESTS)

test-gpu:
	$(AT_HAND) -m pytest -m gpu $(ARGS)

SMALL := "(same_partition or equals_reference or gradients or test_kernel or gold) and not 2048"
sanitize-gpu:
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=.:kernels compute-sanitizer --tool $$tool --error-exitcode 9 \
		$(PYTHON) -m pytest tests/ops -x -m "not slow" -k $(SMALL) || exit 1; \
	done

bench-gpu:
	$(AT_HAND) benchmarks/ops/bench.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(ENVS:%=.venv-%) build dist *.egg-info

# The stamp is written last: an installation that was cut off is done again.
$(STAMP): requirements/$(ENV).txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r $<
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@
