VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A process a core, each of which computes with its share of them.
SPREAD := --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo serve test test-fast clients browser fuzz soak gpu-check humaneval lint format stubs stubs-check

$(READY): pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[server,dev]'
	touch $@

demo: $(READY)    ## answer two questions on a local two-shard cluster
	$(BIN)/pyramidserve demo --config deploy/serve.yaml

serve: $(READY)   ## keep a local cluster up for `pyramidserve chat`
	$(BIN)/pyramidserve serve --config deploy/serve.yaml

test: $(READY)    ## every test: on all cores what computes, one by one what starts clusters
	$(BIN)/pytest $(SPREAD) tests/conformance tests/unit tests/gpu
	$(BIN)/pytest -o faulthandler_timeout=1000 -o faulthandler_exit_on_timeout=true tests/integration tests/packaging

test-fast: $(READY)  ## pure and unit tests
	$(BIN)/pytest $(SPREAD) tests/unit

clients: $(READY) ## clients that other people wrote, each in an environment of its own
	$(BIN)/pytest -m clients tests/clients

browser: $(READY) ## the page in headless Chromium, which must be installed; screenshots go to build/browser
	$(BIN)/pytest -m browser tests/browser

fuzz: $(READY)    ## property tests at random, with 20 times as many examples
	FUZZ=20 $(BIN)/pytest -m hypothesis --timeout 7200 tests/unit tests/conformance

gpu-check: $(READY)  ## rehearse on the CPU what `python -m bench.gpu.check` does on a card
	$(BIN)/python -m bench.gpu.check --device cpu --tiny --out build/gpu-check.json
	$(BIN)/python -m bench.gpu.report build/gpu-check.json
	$(BIN)/python -m bench.gpu.profile --device cpu --tiny

humaneval: $(READY)  ## HumanEval by HTTP, compressed and not, on a cluster of its own; goes on where it was stopped
	$(BIN)/python -m bench.humaneval --out build/humaneval.json

soak: $(READY)    ## what takes long: random kills under load
	$(BIN)/pytest -m soak tests/soak

lint: $(READY)    ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: $(READY)   ## generate pyramidserve/v1 from proto/
	PATH="$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc --proto_path=proto \
	    --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
	    proto/pyramidserve/v1/*.proto

stubs-check: stubs  ## fail when the stubs in the repository are stale
	git diff --exit-code -- pyramidserve/v1
