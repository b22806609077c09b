# One target per task. `make` alone lists them.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
RUN    ?= runs/first
DATA   ?=

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 18

setup: $(VENV)/installed  ## create .venv with everything that the machine allows

$(VENV)/installed: setup.py constraints.txt install.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh install.sh
	@touch $@

ffcv: setup      ## install the ffcv package (needs root or sudo for system packages)
	@VENV="$(VENV)" sh install.sh ffcv

doctor: setup    ## what is installed, what is missing, and how to fix it
	@$(PY) -m pipeline.doctor

train: setup     ## a whole small run: photos, .beton, training, k-NN (DATA=folder for your own)
	@PY="$(PY)" RUN="$(RUN)" DATA="$(DATA)" sh first_run.sh

# Threads of OpenMP that wait for each other on a busy core spin: three times the CPU time.
test test-all: export OMP_NUM_THREADS := 1

test: setup      ## the fast tests, in three processes: many wait for others
	@$(PY) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test-all: setup  ## all tests, the slow ones too
	@$(PY) -m pytest -q -m 'slow or not slow'

lint: setup      ## formatting, imports, types
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

bench: setup     ## loaders, masks and the model's step against the published ones (BETON=file)
	@$(PY) benchmarks/pipeline.py $(if $(BETON),--data $(BETON))
	@$(PY) benchmarks/convert.py
	@$(PY) benchmarks/masks.py
	@$(PY) benchmarks/kernels.py
	@$(PY) benchmarks/model.py
	@$(PY) benchmarks/evaluation/features.py
	@$(PY) benchmarks/evaluation/finetune.py

profile: setup   ## where the time goes: loader, model and both against lower bounds (BETON=file)
	@$(PY) benchmarks/throughput.py $(if $(BETON),--data $(BETON))

gpu: setup       ## everything that needs a GPU, in eight minutes: tests, then benchmarks
	@$(PY) benchmarks/gpu.py --out runs/gpu

clean:           ## remove caches and the synthetic photos; runs and .venv stay
	rm -rf data/synthetic .pytest_cache .ruff_cache .mypy_cache pipeline/__pycache__/compiled-*

.PHONY: help setup ffcv doctor train test test-all lint bench profile gpu clean
.DEFAULT_GOAL := help
