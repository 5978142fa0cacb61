# Every target makes the set-up it needs, and makes it again only when its inputs have changed.
#   make linux  boots Debian's kernel to a shell on the terminal
#   make run    boots a guest with its monitor on the terminal; type cpr-exec there
#   make test   runs the tests
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# compat: a path for Python to look in, and no finder, whose imports each start of it would wait for.
INSTALL := $(BIN)/python -m pip install -q --config-settings editable_mode=compat
NATIVE := $(wildcard $(addprefix cpr/_native/,[!_]*.c *.h tcg/*.c tcg/*.h)) cpr/_native/build.py
GUEST ?= examples/heartbeat.cfg
ARGS ?=
# The tests wait more than they compute: one more at a time than there are CPUs.
JOBS ?= $(shell expr $$(nproc) + 1)
PYTHONS ?= 3.11 3.12 3.13 3.14
LIVE_NEEDS := pytest pytest-timeout pytest-xdist hypothesis cffi psutil uvicorn setuptools

.PHONY: setup setup-dev guests compiled run linux demo test test-nested test-nested-iommufd nested-guests \
	test-live test-pythons bench-live conformance sanitize soak-failures release-data sandbox-table fuzz faults soak states lint format bench clean

setup: $(VENV)/.built guests compiled

setup-dev: $(VENV)/.dev setup

guests: | $(VENV)/.checked
	@$(MAKE) --no-print-directory -s -C examples

# An update is short only where Python finds its bytecode ready.
compiled: $(VENV)/.built
	@$(BIN)/python -m compileall -q cpr

run: setup
	@$(BIN)/python -m cpr.vmm run $(GUEST) $(ARGS)

# Debian's kernel, from its package, to a shell on this terminal.
linux: setup
	@$(BIN)/python -m examples.linux.build
	@$(BIN)/python -m cpr.vmm run examples/linux.cfg $(ARGS)

demo: setup
	@$(BIN)/python -m benchmarks.demo $(ARGS)

test: setup-dev
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# The library's echo server through 100 updates, of which every third fails.
test-live: setup-dev
	LIVE_UPDATES=100 $(BIN)/python -m pytest tests/test_live_examples.py --timeout 1200 $(ARGS)

# The library on other Pythons, versions or paths of programs: those that uv finds or fetches, else
# Debian's, unpacked into a folder.
test-pythons: setup-dev
	@$(BIN)/python -m tests.pythons $(addprefix --needs ,$(LIVE_NEEDS)) $(PYTHONS) -- -n $(JOBS) $(ARGS)

# The library beside what else there is, on a Python that all of it runs on.
bench-live: setup-dev
	@$(BIN)/python -m tests.pythons $(addprefix --needs ,$(LIVE_NEEDS) gunicorn tableflip) \
		--module benchmarks.live $(lastword $(PYTHONS)) -- $(ARGS)

# VFIO, IOMMUFD and KVM on the real kernel interfaces, inside a VM: with Debian's kernel, and with
# one that has iommufd, which is built once.  QEMU_ROOT=FOLDER: a QEMU there is compared with.
test-nested test-nested-iommufd: setup-dev nested-guests
	@$(BIN)/python -m examples.linux.build
	$(BIN)/python -m pytest tests/nested -v --nested=$(if $(@:test-nested=),iommufd,type1) \
		$(if $(QEMU_ROOT),--qemu-root '$(QEMU_ROOT)') $(ARGS)

nested-guests: | $(VENV)/.checked
	@$(MAKE) --no-print-directory -s -C tests/nested/guests

# N failing updates in a row of one VMM under load, on each accelerator; prints what they leave.
N ?= 1000
soak-failures: setup-dev
	$(BIN)/python -m tests.soak.failures -n $(N) $(ARGS)

# N updates in a row of one VM under load, good and failing, early and late, on each accelerator, and
# ten VMs at once; prints what they leave, and the pause.
soak: setup-dev guests
	$(BIN)/python -m tests.soak.updates -n $(N) $(ARGS)

# What this release's updates carry, for the tests of later ones: once for each release.
release-data: setup-dev
	$(BIN)/python -m tests.releases.record

# What -sandbox denies, as the QEMU in QEMU_ROOT=FOLDER asks libseccomp for it.
sandbox-table: setup-dev
	$(BIN)/python -m tests.sandbox.record '$(QEMU_ROOT)'

# The table of QEMU's behaviour, on this VMM and, with QEMU=COMMAND, on a real QEMU beside it.
conformance: setup-dev
	$(BIN)/python -m tests.conformance --vmm '$(BIN)/python -m cpr.vmm run' \
		$(if $(QEMU),--qemu '$(QEMU)') $(ARGS)

# The C page path under the address, undefined-behaviour and thread sanitizers, and the guard.
sanitize: | $(VENV)/.checked
	$(MAKE) -C tests/native PYTHON='$(PYTHON)'

# All fuzzers for MINUTES; atheris and clang are used where they can be had.
MINUTES ?= 10
fuzz: setup-dev guests
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install -q atheris || true
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(ARGS)

# A fault in every step of every way to update; the default run takes a sample.
faults: setup-dev guests
	ALL_FAULTS=1 $(BIN)/python -m pytest tests/test_faults.py $(ARGS)

# MANY long sequences of updates, stops, resets, failures, cancels, kills and clients.
MANY ?= 100
states: setup-dev guests
	MANY_STATES=$(MANY) $(BIN)/python -m pytest tests/test_sequences.py $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build cpr_vmm.egg-info cpr/_native/_*.c cpr/_native/_*.so \
		cpr/_native/*.o cpr/_native/tcg/*.o
	$(MAKE) -C examples clean
	$(MAKE) -C tests/nested/guests clean

# What the build needs from the system: installed where we may, else named.
$(VENV)/.checked:
	@missing=""; \
	command -v gcc >/dev/null && command -v as >/dev/null || missing="$$missing gcc"; \
	test -n "$(PYTHON)" && $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	test -n "$(PYTHON)" && $(PYTHON) -c 'import os, sysconfig, sys; \
	sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null \
		|| missing="$$missing python3-dev"; \
	test -e /usr/include/linux/kvm.h || missing="$$missing linux-libc-dev"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing$$missing"; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	elif [ -n "$$missing" ]; then \
		echo "missing:$$missing; install with: sudo apt-get install$$missing" >&2; exit 1; \
	fi
	@mkdir -p $(VENV) && touch $@

$(BIN)/python: | $(VENV)/.checked
	$(PYTHON) -m venv $(VENV)

# A module with the suffix of one Python only, of an earlier build, would win over today's.
$(VENV)/.installed: pyproject.toml setup.py | $(BIN)/python
	@rm -f cpr/_native/_*.so
	$(INSTALL) -e '.[tcg]'
	@touch $@ $(VENV)/.built

# Installing builds the C; afterwards only the C is built again when it has changed.
$(VENV)/.built: $(NATIVE) | $(VENV)/.installed
	@$(BIN)/python -m cpr._native.build
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(INSTALL) -e '.[tcg,dev,bench]'
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(INSTALL) -e '.[tcg,bench]'
	@touch $@
