# Every command that a person or CI runs. `make help` lists them.

# The major version of Postgres that build, demo, dev and test work with. 15 is the distribution's; 16 and 18 are
# downloaded when they are not installed; for any other server set PG_CONFIG too.
PG ?= 15
# Where `make install` installs to.
INSTALL_PG_CONFIG = $(or $(PG_CONFIG),pg_config)
# Further arguments of cargo test, for example: make test ARGS='--test dml'
ARGS ?=
# For how many seconds `make faults` breaks several things at once (SEED=… repeats a run), and `make fuzz` runs each target.
SECONDS ?= 60
# The cases that make bench runs; all of them by default.
CASE ?=

server = PG_CONFIG='$(PG_CONFIG)' scripts/postgres.sh
# Every major version gets a target directory of its own, so that switching versions rebuilds nothing.
decoder = PGRX_PG_CONFIG_PATH="$$config" CARGO_TARGET_DIR=target/pg$(1) cargo $(2) -p walmirror-decoder \
	--no-default-features --features pg$(1)
library = target/pg$(PG)/release/libwalmirror.so

# What Debian calls the things we need, and the file or module that shows each is there.
packages = postgresql-15:/usr/lib/postgresql/15/bin/postgres \
	postgresql-server-dev-15:/usr/include/postgresql/15/server/postgres.h \
	libclang-dev:/usr/share/doc/libclang-dev libpq-dev:/usr/include/postgresql/libpq-fe.h \
	redis-server:/usr/bin/redis-server pkg-config:/usr/bin/pkg-config gcc:/usr/bin/gcc g++:/usr/bin/g++ \
	protobuf-compiler:/usr/bin/protoc python3-protobuf:/usr/lib/python3/dist-packages/google/protobuf \
	python3-pip:/usr/lib/python3/dist-packages/pip libfaketime:/usr/share/doc/libfaketime openssl:/usr/bin/openssl
missing = $(strip $(foreach p,$(packages),$(if $(wildcard $(lastword $(subst :, ,$(p)))),,$(firstword $(subst :, ,$(p))))))

.PHONY: help deps build extension install demo dev test faults soak faults-valkey test-matrix fuzz check-pg lint bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PG=18 picks the Postgres version (15 is the default; 16 and 18 are downloaded when needed)."
	@echo "  WALMIRROR_REDIS_SERVER=/path/to/valkey-server runs the tests with another Redis, or Valkey."

deps: ## install what is missing with apt (or print the command)
	@command -v cargo > /dev/null || { \
		echo "cargo is missing. Install Rust: https://rustup.rs"; exit 1; }
	@if [ -z "$(missing)" ]; then \
		echo "everything needed is installed"; \
	elif ! command -v apt-get > /dev/null; then \
		echo "missing (Debian package names): $(missing)"; exit 1; \
	elif [ "$$(id -u)" = 0 ]; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(missing); \
	elif sudo -n true 2> /dev/null; then \
		sudo apt-get update -q && sudo env DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -q --no-install-recommends $(missing); \
	else \
		echo "missing; install with:"; echo "  sudo apt-get update && sudo apt-get install $(missing)"; exit 1; \
	fi

build: extension ## build the extension and the walmirror binary
	cargo build --release -p walmirror-sink

extension:
	config=$$($(server) config $(PG)) && $(call decoder,$(PG),build --release)

install: ## install the extension into the Postgres that PG_CONFIG names (default: pg_config)
	config=$$(command -v $(INSTALL_PG_CONFIG)) && \
	major=$$("$$config" --version | sed 's/^PostgreSQL \([0-9]*\).*/\1/') && \
	$(MAKE) --no-print-directory extension PG=$$major PG_CONFIG="$$config" && \
	scripts/install.sh "$$config" target/pg$$major/release/libwalmirror.so && \
	echo "installed into $$("$$config" --pkglibdir); now see README.md, 'Your own database'"

# The environment that the tests, the demo and the benchmark find everything in.
private = env=$$($(server) tree $(PG) $(library)) && eval "$$env" && \
	export WALMIRROR_BIN='$(CURDIR)/target/release/walmirror'

demo: build ## see it work: private servers, a sample database, a load, a full comparison; ends by itself
	@$(private) && cargo run --quiet --release -p walmirror-tests --bin demo

dev: build ## the same servers, up until Ctrl-C, with the commands to connect to them
	@$(private) && cargo run --quiet --release -p walmirror-tests --bin demo -- --stay

test: build ## unit tests, SQL regression and end-to-end tests, on private servers
	$(private) && cargo run --quiet -p walmirror-tests --bin with-postgres -- scripts/test.sh $(ARGS)

faults: build ## break everything there is, on private servers; then SECONDS=60 of several faults at once, by SEED=…
	$(private) && FAULT_SECONDS=$(SECONDS) scripts/test.sh -p walmirror-tests --features faults --test 'faults_*' $(ARGS) \
		-- --test-threads 3

soak: SECONDS = 43200
soak: build ## several faults at once for half a day, or SECONDS=3600: what leaks shows; SEED=1 repeats a run
	$(private) && FAULT_SECONDS=$$((2 * $(SECONDS))) cargo test -p walmirror-tests --features faults --test faults_random $(ARGS) \
		-- --nocapture

faults-valkey: build ## the tests of --durability on Valkey 9.1 (downloaded once), which tells what its disk holds
	$(private) && WALMIRROR_REDIS_SERVER=$$(scripts/valkey.sh) && export WALMIRROR_REDIS_SERVER && \
		cargo test -p walmirror-tests --features faults --test faults_durability $(ARGS) -- --test-threads 2

test-matrix: ## make test on every Postgres version there is a server for
	$(MAKE) test PG=15
	$(MAKE) test PG=16
	$(MAKE) test PG=18

fuzz: ## fuzz the parsers with the stable compiler, two at once: SECONDS=60 each
	@scripts/fuzz.sh $(SECONDS)

check-pg: ## check that the extension compiles for PG=… (14 and 17 need PG_CONFIG=…)
	config=$$($(server) config $(PG)) && $(call decoder,$(PG),check)

lint: ## formatting and clippy, warnings are errors
	cargo fmt --all --check && cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
	cargo clippy --workspace --exclude walmirror-decoder --all-targets --features walmirror-tests/faults -- -D warnings
	cargo clippy --manifest-path tests/fuzz/Cargo.toml -- -D warnings
	config=$$($(server) config $(PG)) && $(call decoder,$(PG),clippy --release) -- -D warnings

# The plugins and client libraries of the peers are looked for when the benchmark runs; what is missing is skipped.
bench: build ## compare with the peers in one run: CASE=decode for one case, QUICK=1 for a tenth, LONG=1 for 10 M rows
	@$(private) && peers=$$(tests/bench/deps.sh) && eval "$$peers" && \
		cargo run --quiet --release -p walmirror-bench -- $(CASE)

clean: ## remove everything that was built
	cargo clean
