# The table of contents of our commands. `make demo` and `make test` need python3.11+, make and git, and nothing else of ours.
# The first that runs: a version manager's shim may be there for a version that is not.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL ?= default
export MODEL

.DEFAULT_GOAL := help
.PHONY: help setup demo fleet cluster cluster-down charts test unit check protos bench bench-vllm bench-served bench-tune images clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Argosy needs Python 3.11 or later: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): a few minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

setup: $(STAMP)  ## virtual environment with everything in it

demo: $(STAMP)  ## start the fleet on real weights and show its main job
	@$(BIN)/python tools/demo.py

fleet: $(STAMP)  ## the same fleet, staying up
	@$(BIN)/python -m services.fleet

cluster: $(STAMP)  ## Argosy by helm on a Kubernetes of its own (root; built once from packages) or a lent one; VALUES=my.yaml
	@$(BIN)/python -m tools.cluster install $(if $(VALUES),--values $(VALUES))

cluster-down: $(STAMP)  ## end that cluster and leave nothing
	@$(BIN)/python -m tools.cluster down --release

charts: $(STAMP)  ## render the charts: goldens, schemas, refusals
	$(BIN)/python -m pytest tests/deploy/render

test: $(STAMP) check unit  ## all checks and all tests: what CI runs

unit: $(STAMP) .venv-vllm/.installed  ## all tests; those of clusters need what docs/adr/0016 lists, or ARGOSY_REQUIRE_TIERS=0,1 fails without it
	ARGOSY_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest

check: $(STAMP)  ## ruff, mypy, import contracts, buf lint and breaking, stub drift
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	@if git ls-tree main buf.yaml 2>/dev/null | grep -q .; then $(BIN)/buf breaking --against '.git#branch=main'; else echo "buf breaking: no main to compare with"; fi
	$(BIN)/python tools/gen_protos.py --check
	$(BIN)/python tools/gen_sync_client.py --check
	$(BIN)/python tools/gen_settings_doc.py --check
	$(BIN)/python tools/gen_alerts.py --check

protos: $(STAMP)  ## format and lint the protos, regenerate the stubs
	$(BIN)/buf format -w
	$(BIN)/buf lint
	$(BIN)/python tools/gen_protos.py
	$(BIN)/python tools/gen_sync_client.py
	$(BIN)/python tools/gen_settings_doc.py

bench: $(STAMP)  ## the engine against transformers generate(), and its quality
	$(BIN)/python benchmarks/engine.py

# vLLM has an environment of its own: its torch is not ours. The three packages it does not start with are built for another torch.
.venv-vllm/.installed: benchmarks/vllm_requirements.txt
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/vllm_requirements.txt
	.venv-vllm/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

bench-vllm: $(STAMP) .venv-vllm/.installed  ## the engine against transformers and vLLM's CPU build, in one run
	$(BIN)/python benchmarks/engine.py --vllm .venv-vllm/bin/python

bench-served: $(STAMP)  ## the fleet against the engine alone; prefix cache, starts, overload, memory, relay
	@for what in served prefix_cache start overload memory relay; do \
	  printf '\n## %s\n' "$$what" && $(BIN)/python -m benchmarks.$$what || exit 1; done

# TRL is a peer here and nothing else: it comes with these benchmarks, not with the product.
bench-tune: $(STAMP)  ## training against transformers and TRL, checkpoints, uploads, adapters, explanations, the way to the first token
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[trl]'
	@for what in training checkpoints upload adapters explain servable; do \
	  printf '\n## %s\n' "$$what" && $(BIN)/python -m benchmarks.$$what || exit 1; done

images: $(STAMP)  ## every image without a container daemon, into ~/.cache/argosy/images
	$(BIN)/python -m tools.images build gateway finetune inference trainer weights

clean:  ## remove what make made
	rm -rf $(VENV) .venv-* build .mypy_cache .ruff_cache .pytest_cache
