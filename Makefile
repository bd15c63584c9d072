# Everything starts here: `make` alone prints this help.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := protos libs/kit libs/sdk $(wildcard services/*)
EXIT ?=
AREA ?= gateway
POINTS ?= 20
SEED ?= 20130501

##@ Use it
.PHONY: run
run: setup ## Start everything on this machine and turn the loop on the flights (EXIT=1: end afterwards)
	@$(BIN)/millrace demo $(if $(EXIT),--exit,)

.PHONY: up
up: setup ## Start every service on this machine and stay up
	@$(BIN)/millrace up

##@ Test it
.PHONY: test
test: setup ## Pass the tests (installs and starts what they need where it may)
	@tools/test

.PHONY: test-unit
test-unit: setup ## Only the tests that need nothing but Python
	@$(BIN)/pytest -q libs services -m "not kafka and not postgres and not redis and not browser and not slow"

.PHONY: spark-test
spark-test: setup ## Historical features on a local Spark beside the service's (downloads 450 MB; needs Java 17)
	@$(BIN)/uv pip install -q --python $(BIN)/python --target build/spark --no-deps -r requirements-spark.txt
	@PYTHONPATH=build/spark SPARK_LOCAL_IP=127.0.0.1 $(BIN)/pytest -q tests/contract/spark_features.py

.PHONY: perf
perf: setup ## Measure AREA=aa_rollouts|controller|features|gateway|ingestion|peers|point_in_time|stream|transformers|vectors|weight_changes (the first and the last N=rollouts|changes) and print the table (build/perf/<area>.json)
	@PYTHONPATH=tools $(BIN)/python -m tests.perf.$(AREA)

.PHONY: soak
soak: setup ## kill -9 of ingestion, the feature service, Kafka and Redis at POINTS=20 random points under load (SEED=n); a restore from nothing
	@MILLRACE_KILL_POINTS=$(POINTS) MILLRACE_KILL_SEED=$(SEED) $(BIN)/pytest -q -s tests/chaos/test_data_kill.py tests/chaos/restore_drill.py

.PHONY: check
check: setup ## Lint, types and import rules
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

##@ On Kubernetes
.PHONY: cluster
cluster: setup ## Bring up a throw-away real cluster on this machine (Debian, root), with the images loaded
	@PYTHONPATH=tools $(BIN)/python -m cluster up && PYTHONPATH=tools $(BIN)/python -m cluster.images --cluster

.PHONY: cluster-test
cluster-test: setup ## Install the chart on that cluster from nothing and run the tests on it
	@CLUSTER=only tools/test

.PHONY: cluster-down
cluster-down: ## Remove the cluster and everything it made
	@PYTHONPATH=tools $(BIN)/python -m cluster down

##@ Build it
.PHONY: setup
setup: $(VENV)/.installed protos/src/.generated ## Virtual environment, generated code and the services

$(BIN)/uv:
	@echo "setup: virtual environment ($(PYTHON))"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv

$(VENV)/.installed: $(BIN)/uv requirements.lock requirements-triton.txt $(addsuffix /pyproject.toml,$(PACKAGES))
	@echo "setup: installing $$(wc -l < requirements.lock) pinned packages (about 7 GB on disk, torch is most of it)"
	@$(BIN)/uv pip install -q --python $(BIN)/python -r requirements.lock
# xds-protos ships an older copy of opentelemetry-proto's files over the real ones; put the real ones back (docs/decisions/0002).
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --reinstall $$(grep '^opentelemetry-proto==' requirements.lock)
# Triton's wheel asks for numpy < 2 for a client this project does not use; its server runs with numpy 2.
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -r requirements-triton.txt
	@$(BIN)/python protos/generate.py
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation $(addprefix -e ,$(PACKAGES))
	@touch protos/src/.generated $@

protos/src/.generated: $(shell find protos/millrace_api -name '*.proto') protos/generate.py | $(VENV)/.installed
	@$(BIN)/python protos/generate.py
	@touch $@

.PHONY: generate
generate: setup crd ## Make everything generated again: code, the CRD, the chart's schema and dashboards
	@$(BIN)/python protos/generate.py && touch protos/src/.generated
	@PYTHONPATH=tools $(BIN)/python -m chart.schema
	@PYTHONPATH=tools $(BIN)/python -m chart.dashboards

.PHONY: crd
crd: setup ## Make the chart's CRD again from the manifest's definition
	@$(BIN)/python -m millrace_rollout_controller.kubernetes.crd charts/millrace-crds

.PHONY: verify
verify: setup ## Fail when a generated file of the charts is not up to date
	@PYTHONPATH=tools $(BIN)/python -m chart.schema --check
	@PYTHONPATH=tools $(BIN)/python -m chart.dashboards --check
	@$(BIN)/python -m millrace_rollout_controller.kubernetes.crd charts/millrace-crds --check

.PHONY: lock
lock: $(BIN)/uv ## Resolve requirements.in into requirements.lock
	@$(BIN)/uv pip compile -q --no-header --no-annotate --no-emit-index-url --no-emit-find-links --python-version 3.11 requirements.in -o requirements.lock

.PHONY: images
images: setup ## Build every image with this machine's Docker (sizes: docs/reference/images.md)
	@PYTHONPATH=tools $(BIN)/python -m cluster.images

.PHONY: clean
clean: ## Remove what was built and what the local run left (not the virtual environment)
	@rm -rf build .millrace protos/src

.PHONY: help
help: ## Print this help
	@awk 'BEGIN {FS = ":.*##"} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*##/ {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
