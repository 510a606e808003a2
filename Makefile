# make demo        sets up and does the main job: pretrains, compares, writes runs/demo/report.html
# make test        sets up and passes the tests that cover every part in minutes; ENV=torch211 or ENV=pascal: those that
#                  another torch could break; ENV=oldest: all of them, with the oldest versions that setup.py allows
# make test-all    those, and then the slow ones (make test-slow)
# make test-gpu    the tests marked `gpu`, with $(PYTHON) and its own torch: nothing is installed
# make sanitize-gpu  memcheck and racecheck of the small kernel tests (compute-sanitizer is part of the CUDA toolkit)
# make verify-gpu  the GPU path on this machine's GPU, with $(PYTHON) and what it has: 25 minutes a call, goes on where it
#                  was, writes one report (docs/verify.md)
# make bench       sets up, installs the peers, and writes benchmarks/results/: throughput, ladder, attention, bank, scaling, data, ops; CPU, two hours
# make bench-gpu   the same on the GPU, with $(PYTHON) and what it has; BENCH=ops ARGS="--op info_nce": one of them
# make formats     measures what each image format is read as, and writes docs/formats.md
# make architectures  trains each of timm's ViTs for a step, and writes docs/architectures.md
# make docs        builds the pages of docs/ into site/, strictly
PYTHON ?= python3
# Not from the environment, where ENV is the name of a shell's start-up file.
ENV := current

ENVS := $(filter-out bench,$(patsubst requirements/%.txt,%,$(wildcard requirements/*.txt)))
ifeq ($(filter $(ENV),$(ENVS)),)
$(error ENV=$(ENV) must be one of: $(ENVS))
endif

VENV := .venv$(patsubst %,-%,$(filter-out current,$(ENV)))
# What another torch could break; the oldest versions of all packages could break anything but the CUDA device that
# computes nothing, which stands in front of the current torch's libraries.
TESTS := $(if $(filter pascal torch211,$(ENV)),tests/ops tests/engine/test_environment.py)
TESTS += $(if $(filter oldest,$(ENV)),--ignore tests/nullgpu)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
AT_HAND := PYTHONPATH=.:kernels $(PYTHON)

.PHONY: demo test test-slow test-all test-gpu verify-gpu sanitize-gpu bench bench-gpu docs formats architectures lint format clean

demo: $(STAMP)
	$(BIN)/ccmim demo --overwrite

# A process per core, up to eight; the tests of a file stay together, for what they share.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile
test: $(STAMP)
	$(PYTEST) -m "not slow" $(TESTS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(TESTS)

test-all: test test-slow

test-gpu:
	$(AT_HAND) -m pytest -m gpu $(ARGS)

SMALL := "(same_partition or equals_reference or gradients or test_kernel or gold) and not 2048"
sanitize-gpu:
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=.:kernels compute-sanitizer --tool $$tool --error-exitcode 9 \
		$(PYTHON) -m pytest tests/ops -x -m "not slow" -k $(SMALL) || exit 1; \
	done

verify-gpu:
	$(AT_HAND) -m ccmim_fast.cli bench verify $(ARGS)

# On two cores steps take 6 to 14 seconds in fp32, 3 to 8 in bf16. Each peer's best form is searched first: 3 to 6
# minutes each. The other lines take less than nine minutes.
LONG := mae-8 ccmim-first ccmim-bank ccmim-all transformers stable-pretraining lightly naive naive-mae naive-ccmim
bench: $(STAMP)
	$(PIP) --no-deps -r requirements/bench.txt
	$(BIN)/ccmim bench throughput --device cpu --batch 16 --precision fp32 --rounds 2 --seconds 2 --only $(LONG)
	$(BIN)/ccmim bench throughput --device cpu --batch 16 --precision bf16 --rounds 2 --seconds 4 --only mae-2 naive-fp32 $(LONG)
	$(BIN)/ccmim bench ladder --device cpu --batch 16 --precision bf16 --rounds 1
	$(BIN)/ccmim bench attention --device cpu --shapes 5
	$(BIN)/ccmim bench bank --device cpu --batch 16 --precision bf16
	$(BIN)/ccmim bench scaling --precision bf16
	$(BIN)/ccmim bench data
	$(BIN)/ccmim bench ops --out benchmarks/results/ops-floors-$(shell date +%F)

BENCH := throughput ladder attention bank ops
bench-gpu:
	for name in $(BENCH); do $(AT_HAND) -m ccmim_fast.cli bench $$name --device cuda $(ARGS) || exit 1; done

# Not --quiet, which hides warnings from --strict.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

formats: $(STAMP)
	PYTHONPATH=tests $(BIN)/python tests/formats_page.py > docs/formats.md.new
	mv docs/formats.md.new docs/formats.md

architectures: $(STAMP)
	PYTHONPATH=tests $(BIN)/python tests/architectures_page.py > docs/architectures.md.new
	mv docs/architectures.md.new docs/architectures.md

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(ENVS:%=.venv-%) build dist site *.egg-info

# The stamp is written last: an installation that was cut off is done again.
$(STAMP): requirements/$(ENV).txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r $<
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@
