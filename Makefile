# Two commands on a fresh machine with Python, pip and make: `make serve` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CONFIG ?= config/demo.yaml
PACKAGES := config deployments kernels router stages

.PHONY: help install serve test check format accuracy bench chaos clients proto clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

install: .venv/test-installed ## create .venv with everything, also what the tests need

# Each again only when what is asked for has changed.
.venv/serve-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/test-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch .venv/serve-installed $@

$(BIN)/python:
	$(PYTHON) -m venv .venv

serve: .venv/serve-installed ## run $(CONFIG), say when it is ready, clean up afterwards
	$(BIN)/python -m stagemesh.deployments.cli run $(CONFIG)

test: install ## all tests; ARGS='-k word' for some
	$(BIN)/python tests/run.py $(ARGS)

check: install .typing/stagemesh ## lint, format, types, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy $(PACKAGES:%=-p stagemesh.%)
	$(BIN)/python -m pytest -q tests/test_structure.py

format: install ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

accuracy: install ## 400 questions over HTTP to the demo model in every quantized format
	$(BIN)/python -m pytest -s -m full $(ARGS)

bench: install ## throughput and latencies over HTTP, and the time of a step outside the model
	$(BIN)/python tests/bench/bench_serve.py $(ARGS)

chaos: install ## attacks on a running application, minutes each; ARGS='chaos doors' for some, --short for short ones
	$(BIN)/python tests/chaos/run.py $(ARGS)

clients: install .clients/installed ## software that others wrote, against the demo; ARGS='openai lm_eval' for some
	$(BIN)/python tests/clients/run.py --python .clients/bin/python $(ARGS)

# An environment of their own: they ask for other versions of what we use.
.clients/installed: constraints.txt
	$(PYTHON) -m venv .clients
	.clients/bin/python -m pip install -q $$(grep '^torch==' constraints.txt) openai anthropic litellm langchain-openai \
		'lm_eval[api]' guidellm
	touch $@

# Through the link, so that protoc derives the imports of the installed package from the path.
proto: install .typing/stagemesh ## generate the gRPC code from its .proto
	$(BIN)/python -m grpc_tools.protoc -I.typing $(foreach kind,python pyi grpc_python,--$(kind)_out=.typing) \
		stagemesh/deployments/proto/inference.proto stagemesh/deployments/proto/grpc_predict_v2.proto

# mypy does not know editable installs; it finds the package `stagemesh` through this link to the root.
.typing/stagemesh:
	mkdir -p .typing
	ln -sfn .. $@

clean: ## remove what the other targets made
	rm -rf .venv .clients .typing .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
