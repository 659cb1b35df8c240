# `make help` lists the targets. Every target sets the virtual environment up first, if anything changed.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
STAMP := $(VENV)/.installed

# Bytecode is written into the virtual environment as far as it is used: a third of the time of all at once.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup reproduce report losses traces test test-slow test-browser test-slurm test-gpu test-versions test-all debian bench lint format reference clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## virtual environment with everything in it (implied by all other targets)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }
	@echo "setting up $(VENV): torch and the rest, a minute or two on the first run"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

# Variables of reproduce, each an option of `hiermoe reproduce`: QUICK=1 or FULL=1; for a cluster ON=slurm, NODES=,
# GPUS_PER_NODE=, PARTITION=, ACCOUNT=, DEVICE=cpu, TIME_LIMIT_MIN=, CLUSTER=.
option = $(if $($(1)),--$(2) '$($(1))')
REPRODUCE = $(if $(QUICK),--quick) $(if $(FULL),--full) $(call option,ON,on) $(call option,NODES,nodes) \
  $(call option,GPUS_PER_NODE,gpus-per-node) $(call option,PARTITION,partition) $(call option,ACCOUNT,account) \
  $(call option,DEVICE,device) $(call option,TIME_LIMIT_MIN,time-limit-min) $(call option,CLUSTER,cluster)

reproduce: setup ## all of the paper's figures and tables, and the verdicts: reports/report.html
	@$(BIN)/hiermoe reproduce $(REPRODUCE)

report: setup ## the report alone, from the records there are
	@$(BIN)/hiermoe report

losses: setup ## loss curves of real training under every system, for the report (some minutes)
	@$(BIN)/hiermoe train -m +sweeps/train=losses
	@$(BIN)/hiermoe report

reference: reproduce losses debian ## the small copy of the report that is committed: reports/reference
	@$(BIN)/hiermoe report --reference
	@$(BIN)/python -m tests.analysis.browser reports/report.html reports/reference
	@$(BIN)/hiermoe advise trace=qwen3_30b_a3b_e128_late cluster=a6000_4x8 share=0.4 \
	  picture=reports/reference/figures/advice_qwen3_a6000.png

# What Table IV asks for beside the shipped traces.
TRACES := $(addprefix results/traces/qwen3_30b_a3b_e,64_late.trace 256_late.trace)

traces: setup ## record what is not shipped: other E (hours on two cores)
	@echo "recording $(words $(TRACES)) traces, hours each on two cores; those that exist are kept"
	@$(MAKE) --no-print-directory $(TRACES)

results/traces/qwen3_30b_a3b_e%_late.trace:
	@$(BIN)/hiermoe record model=qwen3_30b_a3b_narrow model.num_experts=$* '~stages.early' layers=[1] \
	  output=results/traces/qwen3_30b_a3b_e$*.trace

# Two workers, so that what waits runs beside what computes; tests/conftest.py says which tests stay together.
PYTEST := $(BIN)/pytest -q -n 2 --dist loadgroup --no-loadscope-reorder --ignore=tests/benchmarks --ignore=tests/gpu

test: setup ## the tests, five to ten minutes on two cores
	@$(PYTEST) -m 'not slow and not slurm and not browser and not versions'

test-slow: setup ## the slower checks
	@$(PYTEST) -m 'slow and not slurm and not browser and not versions'

test-browser: setup debian ## the report in a real browser, on a desk and on a phone (root; installs chromium)
	@$(BIN)/pytest -q -m browser tests/analysis

test-slurm: setup debian ## measured runs under a real Slurm of four nodes on this machine (root; installs slurm-wlm and munge)
	@$(BIN)/pytest -q -m slurm tests/slurm

test-gpu: setup ## what this machine's GPUs can check: eight ranks over NCCL on however few there are (ten minutes)
	@$(BIN)/python -m tests.gpu

test-versions: setup ## commands under every Python that this machine has of 3.11 to 3.13 (gigabytes; six minutes in all)
	@$(BIN)/pytest -q -m versions tests/documents

test-all: setup debian ## all of these but test-gpu and test-versions, and which of them took longest
	@$(PYTEST) -m 'not slurm and not versions' --durations=40
	@$(BIN)/pytest -q -m slurm tests/slurm

debian: # what tests need beside Python
	@command -v slurmctld slurmd munged chromium chromedriver >/dev/null || { apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends slurm-wlm munge chromium chromium-driver; } >/dev/null

bench: setup ## planner speed, as ratios against references in the same run
	@$(BIN)/pytest tests/benchmarks --benchmark-only -q

lint: setup ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: setup ## ruff's formatter and fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove runs, reports and caches (not recordings, not the virtual environment)
	rm -rf results/runs reports/report.html reports/report.md reports/verdicts.csv reports/statements.csv reports/figures wandb
	rm -rf .cache/hydra .pytest_cache .ruff_cache .hypothesis .benchmarks
