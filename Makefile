# Two commands do everything on a fresh machine: `make report` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE = 1

.PHONY: report test lint docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $@

## The main job: are the patched models still the same models, and how much faster are they?
report: $(VENV)/.installed
	$(BIN)/hf-gdn report --output hf-gdn-report

## All tests. Triton decides at import whether it interprets, hence two processes.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not interpret" $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpret $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/models_table.py --check

## The tables of families, features and backends in docs/models.md and README.md.
docs: $(VENV)/.installed
	$(BIN)/python scripts/models_table.py

clean:
	rm -rf $(VENV) hf-gdn-report
