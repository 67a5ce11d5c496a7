# Two commands do everything on a fresh machine: `make report` and `make test`.
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS     ?= 2
BIN          = $(VENV)/bin
PIP          = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
export HF_HUB_OFFLINE = 1

.PHONY: report test test-oldest test-newest lint docs clean

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $@

## The main job: are the patched models still the same models, and how much faster are they?
report: $(VENV)/.installed
	$(BIN)/hf-gdn report --output hf-gdn-report

## All tests. Triton decides at import whether it interprets, hence two processes.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not interpret" $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m interpret $(ARGS)

## The same tests on the oldest transformers we support: constraints.txt, but for what constraints-oldest.txt names.
test-oldest: .venv-oldest/constraints.txt
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=$<

.venv-oldest/constraints.txt: constraints-oldest.txt constraints.txt
	mkdir -p $(@D)
	awk -F== '!/^#/ && !named[$$1]++' $^ >$@

## The same tests on the newest 5.x of today, hence a new venv each time; only torch and triton keep their versions.
test-newest:
	rm -rf .venv-newest && mkdir .venv-newest
	grep -E '^(torch|triton)==' constraints.txt >.venv-newest/constraints.txt
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=.venv-newest/constraints.txt

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/models_table.py --check

## The tables of families, features and backends in docs/models.md and README.md.
docs: $(VENV)/.installed
	$(BIN)/python scripts/models_table.py

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest hf-gdn-report
