# Two commands do everything on a fresh machine: `make report` and `make test`.
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS     ?= 2
# Of test-with; 5.23 is the last one before past_key_values and cache_params were renamed to cache.
TRANSFORMERS ?= 5.23.0
# Of test-newest: packages that keep the version of constraints.txt.
PINNED      ?= torch triton
BIN          = $(VENV)/bin
PIP          = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
VERSIONS     = $(BIN)/python --version && $(BIN)/python -m pip list --disable-pip-version-check \
               | grep -E '^(transformers|accelerate|torch|triton|kernels) '
export HF_HUB_OFFLINE = 1

.PHONY: report versions test test-all test-oldest test-with test-newest test-install lint docs site dist clean

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $@

## The main job: are the patched models still the same models, and how much faster are they?
report: $(VENV)/.installed
	$(BIN)/hf-gdn report --output hf-gdn-report

## Versions of the packages that results depend on.
versions: $(VENV)/.installed
	@$(VERSIONS)

## The tests. Triton decides at import whether it interprets, hence two processes.
test: versions
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not interpret" $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m interpret $(ARGS)

## Every family and every target in every test: half as long again. So do the targets below.
test-all:
	$(MAKE) test ARGS="--all $(ARGS)"

## All tests on the oldest transformers we support: constraints.txt, but for what constraints-oldest.txt names.
test-oldest: .venv-oldest/constraints.txt
	$(MAKE) test-all VENV=.venv-oldest CONSTRAINTS=$<

.venv-oldest/constraints.txt: constraints-oldest.txt constraints.txt
	mkdir -p $(@D)
	awk -F== '!/^#/ && !named[$$1]++' $^ >$@

## All tests on any other transformers 5.x: make test-with TRANSFORMERS=5.23.0
test-with: .venv-$(TRANSFORMERS)/constraints.txt
	$(MAKE) test-all VENV=.venv-$(TRANSFORMERS) CONSTRAINTS=$<

.venv-5.%/constraints.txt: constraints.txt
	mkdir -p $(@D)
	sed 's/^transformers==.*/transformers==5.$*/' $< >$@

## All tests on the newest 5.x of today, hence a new venv each time; `make test-newest PINNED=` pins nothing at all.
test-newest:
	rm -rf .venv-newest && mkdir .venv-newest
	awk -F== 'index(" $(PINNED) ", " " $$1 " ")' constraints.txt >.venv-newest/constraints.txt
	$(MAKE) test-all VENV=.venv-newest CONSTRAINTS=.venv-newest/constraints.txt

## As a user installs it: into an empty venv, from a copy of the sources, nothing pinned but torch (whose newest build for
## CUDA is gigabytes). First the core alone, which has to patch; then with hf-gdn[eval], and a short report, from a folder
## in which the checkout cannot be imported.
test-install: VENV = .venv-install
test-install: CONSTRAINTS = $(VENV)/torch.txt
test-install:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	mkdir $(VENV)/source
	cp -r pyproject.toml README.md LICENSE hf_gdn $(VENV)/source
	grep ^torch== constraints.txt >$(CONSTRAINTS)
	$(PIP) --no-compile torch
	$(PIP) --no-compile ./$(VENV)/source
	cd $(VENV) && bin/python -c "import hf_gdn; hf_gdn.patch(); assert hf_gdn.status().active"
	cd $(VENV) && (bin/hf-gdn report; test $$? -eq 2) 2>&1 | grep "pip install 'hf-gdn\[eval\]'"
	$(PIP) --no-compile './$(VENV)/source[eval]'
	@$(VERSIONS)
	@cd $(VENV) && bin/python -c "from importlib.util import find_spec; print(find_spec('hf_gdn').origin)" | grep site-packages
	cd $(VENV) && OMP_NUM_THREADS=1 bin/hf-gdn report --quiet --output report \
		--windows 2 --context 128 --batch 1 --prompt 32 --new-tokens 8 --rounds 1
	cd $(VENV) && bin/python -c "import json; assert json.load(open('report/report.json'))['passed'] is True"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/models_table.py --check

## The tables of families, features and backends in docs/models.md and README.md.
docs: $(VENV)/.installed
	$(BIN)/python scripts/models_table.py

## The documentation as a site, in site/. Warnings are errors, dead links among them.
site: .venv-site/.installed
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --strict

## Wheel and source distribution, in dist/, with the checks of an upload.
dist: .venv-dist/.installed
	rm -rf dist
	.venv-dist/bin/python -m build --quiet
	.venv-dist/bin/twine check --strict dist/*

# Neither needs torch. Ruff lays out the signatures of the API's page.
.venv-site/.installed: TOOLS = mkdocs-material 'mkdocstrings[python]' ruff
.venv-dist/.installed: TOOLS = build twine
.venv-site/.installed .venv-dist/.installed: constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TOOLS)
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-install .venv-site .venv-dist .venv-5.* hf-gdn-report site dist
