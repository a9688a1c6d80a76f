# sandboxd: one request, one image, two walls. `make help` lists what there is to make.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# One clock for all scripts of one call: see scripts/lib.sh.
export SANDBOXD_MAKE_STARTED := $(shell date +%s)

# Static binaries; the same source at another path makes the same bytes.
export CGO_ENABLED := 0
export GOFLAGS := -buildvcs=false -trimpath

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
COMMIT := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
SPEC := github.com/sandboxd/sandboxd/pkg/spec
LDFLAGS := -s -w -X $(SPEC).Version=$(VERSION) -X $(SPEC).Commit=$(COMMIT)

PROGRAMS := sandboxd sandboxctl sandbox-agent sandbox-vsock
BINARIES := $(PROGRAMS:%=bin/%)
SOURCES := $(shell find api cmd pkg -name '*.go' -not -name '*_test.go') $(shell find api cmd pkg deploy -type f -not -name '*.go' 2>/dev/null) go.mod go.sum

.PHONY: help
help: ## list what there is to make
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24

.PHONY: build
build: $(BINARIES) ## the four static programs, into bin/

# All four in one go: they share most of their packages. The version alone makes nothing stale: it is looked at when
# something else has changed, so that a build with nothing to do stays quiet.
$(BINARIES) &: $(SOURCES) Makefile | .cache/log
	@scripts/setup.sh modules
	@. scripts/lib.sh; step "build $(BINARIES)" go build -ldflags "$(LDFLAGS)" -o bin/ $(PROGRAMS:%=./cmd/%)
	@touch $(BINARIES)

.cache/log:
	@mkdir -p $@

.PHONY: test-assets
test-assets: ## fetch what tests and demo need: packages, guest kernel, images
	@scripts/setup.sh

.PHONY: test
test: test-assets build proto-check lint test-unit test-e2e ## everything that CI runs

.PHONY: test-unit
test-unit: test-assets build ## tests beside the code
	@scripts/test.sh unit

.PHONY: test-e2e
test-e2e: test-assets build ## scenarios through the programs, each in a container and in a VM
	@scripts/test.sh e2e

.PHONY: test-host
test-host: test-assets ## what this machine may lack, in a Debian of its own in QEMU: KVM, kernel vsock, cgroup v2, systemd
	@scripts/test.sh host

.PHONY: crash
crash: test-assets build ## kill the daemon at every step of every workload's life, and look what is lost or left
	@scripts/crash.sh

.PHONY: soak
soak: test-assets build ## many callers and random disturbances for SOAK (60s), then CYCLES (2000) workloads that come and go
	@scripts/soak.sh

.PHONY: fuzz
fuzz: ## every fuzz test for FUZZTIME (20s) each
	@scripts/fuzz.sh

.PHONY: package
package: build ## the Debian package, into dist/
	@scripts/package.sh

.PHONY: demo
demo: test-assets build ## one program, one image, two walls: see it work
	@scripts/demo.sh

.PHONY: bench
bench: test-assets build ## measure against crun, runc, podman, bubblewrap and bare QEMU
	@scripts/setup.sh bench-packages
	@. scripts/lib.sh; step "build bench" go build -o .cache/bench ./bench
	@.cache/bench

.PHONY: bench-trace
bench-trace: test-assets build ## show where the time of a container's life goes
	@. scripts/lib.sh; step "build bench" go build -o .cache/bench ./bench
	@.cache/bench -trace -runs 60

.PHONY: lint
lint: ## gofmt, vet, staticcheck, shellcheck, buf lint
	@scripts/lint.sh

.PHONY: proto
proto: ## write the API's Go code
	@scripts/proto.sh generate

.PHONY: proto-check
proto-check: ## fail when the committed API code is stale
	@scripts/proto.sh check

.PHONY: clean
clean: ## remove bin/ and what tests left in .cache; downloads stay (make distclean takes them too)
	@rm -rf bin dist .cache/log .cache/proto-check.* .cache/stamp/validateproto .cache/proto

.PHONY: distclean
distclean: clean ## remove everything that is not source
	@rm -rf .cache
