# PYTHON=/path/to/python3.11 chooses the Python, LOCK=gpu the CUDA build of torch that the driver runs; .venv keeps both choices.
# FAULTS_SEED=1 chooses other random moments.
.PHONY: setup run test faults lint lab render lock

setup:
	@PYTHON="$(PYTHON)" sh -c "$$(tr -d '\r' < env/setup.sh)" env/setup.sh "$(LOCK)"
run: setup
	.venv/bin/workbook run --profile laptop
test: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile --cov --cov-report=term --cov-fail-under=85
faults: setup
	.venv/bin/python -m pytest tests/faults -n 2 -m "whole or not whole"
lint: setup
	sh env/lint/lint.sh
lab: setup
	.venv/bin/workbook lab
render: setup
	.venv/bin/workbook render
lock: setup
	.venv/bin/python env/requirements/lock.py
