# Overplane's targets. `make help` lists them.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# Settings, for the environment or the command line.
FUZZTIME  ?= 10s
BENCHTIME ?= 1s
BENCH     ?= .
# How much slower a stage in memory may be than its baseline, in multiples of the reference loop, and how both are measured.
BENCH_LIMIT    ?= 2
BENCH_PIPELINE := --rounds 7 --span 400ms
# Compiled BPF objects are committed and compared byte for byte, so that the compiler's version is part of the source.
CLANG     ?= clang-14
# 6.1, 6.12, newest: the Debian kernels of make test-kernels.
KERNELS   ?= 6.1 6.12 newest
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

export OVERPLANE_BIN := $(CURDIR)/bin

# Where make install puts what: $(DESTDIR)$(PREFIX)/bin and so on. Units are changed to name the programs there.
DESTDIR    ?=
PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc

# buf and nfpm have modules of their own: .ci/buf.mod, .ci/nfpm.mod.
BUF := go tool -modfile=.ci/buf.mod buf

PROGRAMS := $(notdir $(wildcard cmd/*))

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

.PHONY: build
build: ## build the programs into bin/
	@mkdir -p bin
	@for p in $(PROGRAMS); do \
		echo "go build -o bin/$$p ./cmd/$$p"; \
		go build -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/$$p ./cmd/$$p || exit 1; \
	done

.PHONY: install
install: build ## install programs, units, env files and completions (DESTDIR= PREFIX=/usr/local); starts nothing
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' deploy/install

.PHONY: uninstall
uninstall: ## remove what make install installed, but not /etc/overplane (DESTDIR= PREFIX=/usr/local)
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' deploy/install --remove

.PHONY: deb
deb: build ## Debian packages of overplane, overplaned and overplane-controller in dist/
	@deploy/packages/build '$(VERSION)'

.PHONY: demo
demo: build ## a cluster of three nodes on this machine: up, prove, down (needs root; asks sudo)
	@if [ "$$(id -u)" = 0 ]; then exec bin/overplane lab run; \
	elif command -v sudo >/dev/null; then \
		echo "The lab makes network namespaces and needs root: sudo bin/overplane lab run"; exec sudo bin/overplane lab run; \
	else echo "make demo: the lab makes network namespaces and needs root, and there is no sudo. Run it as root." >&2; exit 1; fi

.PHONY: test
test: build ## all tests, with and without the race detector, and end to end (needs root; asks sudo; without, what needs none)
	@.ci/test

.PHONY: test-arm64
test-arm64: ## unit tests that need no kernel, built for arm64, under QEMU's user mode
	@.ci/test-arm64

.PHONY: test-kernels
test-kernels: ## boot Debian kernels in QEMU and test every rung in each (KERNELS="6.1 6.12 newest"; no root, no KVM)
	@test/kernels/run $(KERNELS)

.PHONY: test-units
test-units: build ## the systemd units under a systemd of their own, in a container made of namespaces (needs root and systemd)
	@test/systemd/run

.PHONY: test-deb
test-deb: ## build the packages; install, upgrade, remove and purge them in a folder (needs root and dpkg)
	@test/packages/run

.PHONY: bench
bench: ## all Go benchmarks (BENCH=regexp BENCHTIME=1s)
	@go test -run '^$$' -bench '$(BENCH)' -benchmem -benchtime '$(BENCHTIME)' -timeout 60m \
		$$(grep -rlE '^func Benchmark' --include='*_test.go' bench cmd control dataplane ipam snat test | xargs -r -n1 dirname | sort -u | sed 's,^,./,')

.PHONY: bench-compare
bench-compare: ## the data plane's stages in memory against the committed baseline, as multiples of a reference loop (BENCH_LIMIT=2)
	@mkdir -p bin && go build -trimpath -o bin/overplane-bench ./cmd/overplane-bench
	@bin/overplane-bench pipeline $(BENCH_PIPELINE) --out bench-out/pipeline >/dev/null
	@bin/overplane-bench compare --limit $(BENCH_LIMIT) bench/baseline.json bench-out/pipeline/result.json

.PHONY: bench-baseline
bench-baseline: ## make the baseline of bench-compare anew, on a quiet machine
	@mkdir -p bin && go build -trimpath -o bin/overplane-bench ./cmd/overplane-bench
	@bin/overplane-bench pipeline $(BENCH_PIPELINE) --out bench-out/pipeline >/dev/null
	@cp bench-out/pipeline/result.json bench/baseline.json

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME=10s
	@set -eo pipefail; grep -rHoE '^func Fuzz[A-Za-z0-9_]+' --include='*_test.go' bench cmd control dataplane ipam snat test | sort | while IFS=: read -r file func; do \
		echo "== $${func#func } in $$(dirname $$file)"; \
		go test -run '^$$' -fuzz "^$${func#func }\$$" -fuzztime '$(FUZZTIME)' -fuzzminimizetime 5x ./$$(dirname $$file) </dev/null; \
	done

.PHONY: generate
generate: check-clang ## all generated files: BPF objects, protobuf, names, reference pages
	BPF2GO_CC='$(CLANG)' BPF2GO_STRIP='$(subst clang,llvm-strip,$(CLANG))' go generate ./...
	$(BUF) generate

.PHONY: check-clang
check-clang:
	@v=$$($(CLANG) -dumpversion 2>/dev/null) || { \
		echo "make generate: $(CLANG) is not there (Debian, Ubuntu: apt-get install clang-14 llvm-14 libbpf-dev)." >&2; exit 1; }; \
	case $$v in 14.*) ;; *) \
		echo "make generate: $(CLANG) is version $$v. The committed BPF objects are made by clang 14; another writes other bytes." >&2; exit 1;; esac

.PHONY: lint
lint: ## gofmt, vet, staticcheck, protocol rules and compatibility, freshness of generated files
	@.ci/lint

.PHONY: clean
clean: ## remove what the targets made, but not Go's caches
	rm -rf bin dist coverage.out
	find . -name '*.test' -not -path './.git/*' -type f -delete
	find . -name '*.prof' -not -path './.git/*' -type f -delete
