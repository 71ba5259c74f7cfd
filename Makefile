# Everything that a fresh machine needs is made here: a virtual environment, the packages, then the work itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup tools demo test test-gpu test-long scorecards lint types clean

setup: $(VENV)/.installed tools

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), "constraints.txt is for Python 3.11: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,s3]'
	@touch $@

# The tests want Prometheus with its promtool, Redis and iptables, which pip does not have; the demo uses Prometheus when
# it is there.
tools:
	@command -v prometheus >/dev/null && command -v promtool >/dev/null && command -v redis-server >/dev/null \
	&& command -v iptables >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	     && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus redis-server iproute2 iptables; } \
	|| echo "prometheus, promtool, redis-server or iptables is missing: make test needs them" \
	        "(Debian: sudo apt-get install prometheus redis-server iproute2 iptables)"

# Two runs on a local Ray cluster, one of them under fire, and their comparison.
demo: setup
	$(BIN)/python -P -m orchestrator demo --json out/demo.json

# Tests with a Ray cluster wait for real deadlines most of the time; the others use what processor time they leave, and a
# tenth of it where they leave none: no test shall time out because it is not run at all.
test: setup
	@mkdir -p out
	@nice -n 10 $(BIN)/python -m pytest tests/unit tests/storage > out/unit-tests.log 2>&1 & unit=$$!; \
	$(BIN)/python -m pytest --durations 12 tests/chaos tests/cluster; with_ray=$$?; \
	echo "the tests without a Ray cluster, which have run beside them:"; \
	wait $$unit; unit=$$?; cat out/unit-tests.log; exit $$((with_ray || unit))

# Training, parking, audit and recovery on the first GPU, which all ranks share; snapshots lie where CUDA can pin them.
test-gpu: setup
	SHEPHERD_TEST_DEVICE=cuda $(BIN)/python -m pytest -m "long or not long" --basetemp /dev/shm/shepherd-test-gpu \
	--durations 12 tests/unit/test_parallel.py tests/unit/test_audit_ranks.py tests/unit/test_parking.py \
	tests/cluster/test_recovery.py tests/cluster/test_hangs.py tests/cluster/test_flight_records.py

# Tests marked long, some on S3 servers that are installed first (LocalStack, Ceph, rclone), then chaos of 60 seeds, 300
# flipped bits and 2,000 clean steps. Every part runs, also after one that has failed.
test-long: setup
	@echo "this takes about two hours"
	PYTHON=$(PYTHON) tests/storage/install.sh
	@failed=; run() { echo "$$*"; "$$@" || failed="$$failed; $$*"; }; \
	run $(BIN)/python -m pytest -m long tests/unit tests/storage; \
	run $(BIN)/python -m pytest -m long tests/chaos tests/cluster; \
	run $(BIN)/python tests/chaos/sweep.py --seeds 60; \
	run $(BIN)/python tests/chaos/flips.py --flips 300 --clean-steps 2000; \
	test -z "$$failed" || { echo "failed$$failed"; exit 1; }

# The table in docs/chaos.md: every scenario in a run of its own, as root, for networks of their own.
scorecards: setup
	$(BIN)/python tests/chaos/scorecards.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
