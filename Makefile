# What people and CI run. Each target installs what it needs (scripts/install).

.PHONY: help install demo test test-faults fresh check format bench lab-up lab-down clean

help:
	@echo "make demo      a clone between two real hosts on this machine, from nothing"
	@echo "make test      the tests, real hosts included: ten minutes"
	@echo "make test-faults  the whole fault matrix and the long tests: an hour"
	@echo "make fresh     make demo and make test in a minimal Debian that never saw the project: twenty minutes"
	@echo "make check     ruff, strict mypy, format, shellcheck"
	@echo "make format    format the code"
	@echo "make bench     kvm-clone beside scp, rsync, nbdcopy and others"
	@echo "make lab-up    two libvirt hosts, kc-a and kc-b;  make lab-down ends them"

install:
	@scripts/install

demo:
	@scripts/demo

test:
	@scripts/test

test-faults:
	@scripts/test -m faults

fresh:
	@scripts/fresh $(FRESH)

check:
	@scripts/check

format:
	@scripts/install dev
	.venv/bin/ruff check --fix --quiet
	.venv/bin/ruff format

bench:
	@scripts/install runtime lab dev bench
	.venv/bin/python bench/bench.py $(BENCH)

lab-up:
	@scripts/install lab
	@lab/lab up

lab-down:
	@for state in .lab .lab-gw*; do KVM_CLONE_LAB_STATE=$$state lab/lab down; done

clean: lab-down
	rm -rf .venv .lab .lab-gw* dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
