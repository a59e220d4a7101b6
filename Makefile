# SPDX-License-Identifier: GPL-2.0
#
# The front door; `make` lists what there is. Works on Debian 12 and 13, as root, with make and a network;
# everything is set up on the way and cached in ~/.cache/pristine (PRISTINE_CACHE).

SHELL := /bin/bash
PREFIX ?= /usr/local
DESTDIR ?=
# The stock kernels that the module is tested on, by the beginnings of their releases.
KERNELS ?= 7.3 7.2
export KREL
# The scripts run what is parallel in parallel by themselves.
.NOTPARALLEL:

.PHONY: help
help: ## lists the targets
	@echo "Pristine. Targets:"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "KREL=<release> chooses the kernel (scripts/kernel-metadata --list); JOBS=<n> the parallel jobs."

.PHONY: setup
setup: ## makes the sysroot and the kernel's build tree (everything else does so by itself)
	@scripts/sysroot
	@scripts/kernel-metadata

.PHONY: demo
demo: ## provisions a machine, breaks it, reboots it into its master image
	@scripts/sysroot >/dev/null
	@tests/demo/run

.PHONY: test
test: ## all test lanes: unit, kunit, lab, vm
	@tests/lib/run-all vm kunit lab unit

.PHONY: test-unit
test-unit: ## the userspace's own tests
	@tests/lib/run-unit

.PHONY: test-kunit
test-kunit: modules-lab ## the module's KUnit suites, in the lab kernel (User-Mode Linux)
	@tests/lib/run-kunit

.PHONY: test-lab
test-lab: modules-lab userspace ## scenarios in the lab kernel, with KASAN and all checkers
	@tests/lib/run-lane lab

.PHONY: test-vm
test-vm: modules userspace ## scenarios in the stock kernel, in QEMU
	@tests/lib/run-lane vm

.PHONY: test-long
test-long: ## all lanes with what takes long, and the stock kernels of the matrix (KERNELS=)
	@TEST_LONG=1 tests/lib/run-all $(addprefix vm@,$(KERNELS)) kunit lab unit fuzz mutations

.PHONY: test-fuzz
test-fuzz: ## fuzzes formats, recovery, table and status lines: RUNS inputs each, 10 million by default
	@tests/fuzz/run

.PHONY: test-mutations
test-mutations: modules-lab userspace ## breaks the module on purpose: the tests of the contract must notice
	@tests/mutations/run

.PHONY: bench
bench: bench-cost bench-latency bench-scaling bench-activation bench-revert bench-fetch bench-serve bench-update bench-build ## all benchmarks

.PHONY: bench-cost
bench-cost: modules userspace ## instructions per I/O, beside device-mapper's other targets
	@tests/bench/cost

.PHONY: bench-latency
bench-latency: modules userspace ## first touch when flushes of the metadata take time
	@tests/bench/latency

.PHONY: bench-scaling
bench-scaling: modules userspace ## two CPUs writing at once
	@tests/bench/scaling

.PHONY: bench-activation
bench-activation: modules userspace ## activation, checkpoints, memory and log bytes of a device of 1 TiB
	@tests/bench/activation

.PHONY: bench-revert
bench-revert: modules userspace ## what taking changes back costs: instantly, eagerly, and to a booted system
	@tests/bench/revert

.PHONY: bench-fetch
bench-fetch: modules userspace ## reads of stale blocks and hydration, beside dm-clone over nbd and a plain copy
	@tests/bench/fetch

.PHONY: bench-serve
bench-serve: userspace ## 200 clients fetch an image at once, beside nginx
	@tests/bench/serve

.PHONY: bench-update
bench-update: userspace ## bytes between two generations, beside casync, zsync, zchunk and RAUC
	@tests/bench/update

.PHONY: bench-build
bench-build: userspace ## building an image, beside casync and zstd
	@tests/bench/build

.PHONY: modules
modules: ## build/<release>/dm-pristine.ko for the stock kernel
	@scripts/modules

.PHONY: modules-lab
modules-lab: ## build/uml/dm-pristine.ko for the lab kernel
	@scripts/modules --uml

.PHONY: userspace
userspace: ## build/userspace/{pristine,pristine-agent}
	@scripts/userspace

.PHONY: lint
lint: ## formatting, clippy, shellcheck and the project's own rules
	@scripts/lint

.PHONY: install
install: modules userspace ## the programs to PREFIX, the module to /lib/modules/<KREL> (DESTDIR= stages)
	@scripts/install "$(DESTDIR)" "$(PREFIX)"

.PHONY: clean
clean: ## removes build/ (the cache stays: rm -rf ~/.cache/pristine)
	rm -rf build
