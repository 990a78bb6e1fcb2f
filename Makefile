# Everything runs in .venv, set up from requirements/py311-cpu.txt on first use.  `make test` from a fresh clone needs nothing else.
PYTHON ?= python3.11
PY := .venv/bin/python
export OMP_NUM_THREADS := 1

.PHONY: test test-commands test-mutants test-faults test-versions test-parity test-smoke lint docs demo demo-onpolicy demo-onpolicy-seeds demo-realign dynamics setup clean
setup: .venv/ok
.venv/ok: requirements/py311-cpu.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q --no-deps -r requirements/py311-cpu.txt
	$(PY) -m pip install -q --no-deps -e .
	touch $@

test: setup lint
	$(PY) -m pytest -n 2 --dist loadfile --durations 15

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy --no-error-summary

docs: setup
	$(PY) -m mkdocs build --strict

test-mutants: setup
	$(PY) -m tests.mutants

test-commands: setup
	$(PY) -m tests.walk.run

test-faults: setup
	$(PY) -m tests.faults.run

test-versions: setup
	$(PY) tests/versions/run.py

test-parity: setup
	$(PY) -m tests.parity.run

test-smoke: setup
	SMOKE_ALL=1 $(PY) -m pytest tests/cli/test_smoke_runs.py

demo: setup
	$(PY) examples/demo.py

demo-onpolicy: setup
	$(PY) examples/demo_onpolicy.py

demo-onpolicy-seeds: setup
	$(PY) examples/demo_onpolicy.py runs/demo-onpolicy-seeds --seeds 3

demo-realign: setup
	$(PY) examples/demo_realign.py

dynamics: setup
	for study in chord_entropy dft_generalise chord_shift chord_shift_far realign srft_stages page; do $(PY) -m benchmarks.dynamics.$$study || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info
