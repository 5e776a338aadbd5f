# Every target first sets up .venv if necessary. The README has the same commands for use without make.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-all coverage faults lint
demo: .venv/ready
	$(PY) -m scripts.demo

test: .venv/ready
	$(PY) -m pytest -n logical --maxprocesses 4

test-all: .venv/ready
	$(PY) -m pytest -m "not gpu" -n logical --maxprocesses 4

# Lines and branches that test-all reaches in its own process; what runs in processes of their own is not counted.
coverage: .venv/ready
	$(PY) -m pytest -m "not gpu" -n logical --maxprocesses 4 --cov --cov-report=term

# Slow fault-injection tests: processes killed at any moment, damaged files, full disks.
faults: .venv/ready
	$(PY) -m pytest -m "not gpu" tests/test_faults.py tests/test_parallel.py tests/test_resume.py tests/test_killed.py tests/test_full_disk.py \
	  tests/test_ablate_stops.py

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sash needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	@touch $@
