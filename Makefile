# Each target sets itself up: the first one run in a clone makes .venv, later ones reuse it until pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CODE := $(wildcard glem_augment tests examples benchmarks docs)

.PHONY: demo test slow floor lint format numbers dist docs install clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py --out demo-out

# Each process takes half of the tests in their order, so that few files are divided: the tests of a file share fixtures.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

slow: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 -m slow

# The tests with the lowest versions that pyproject.toml allows. They want a Python of their time: `PYTHON=python3.10`.
floor:
	$(PYTHON) -m venv .venv-floor
	sed -nE 's/^ +"([A-Za-z-]+)>=([0-9.]+)",$$/\1==\2/p' pyproject.toml > .venv-floor/floor.txt
	.venv-floor/bin/python -m pip install --quiet -c .venv-floor/floor.txt -e '.[test]'
	.venv-floor/bin/python -m pytest -q -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# The tables of README.md, docs/ and benchmarks/results, from the stored rows.
numbers: $(STAMP)
	$(BIN)/python benchmarks/results.py

# Wheel and sdist, tried in a fresh environment: the wheel outside of this folder, and the tests of the sdist.
dist: $(STAMP)
	rm -rf dist build .venv-dist
	$(BIN)/python -m build
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet "$$(ls dist/*.whl)[test]"
	tar -xzf dist/*.tar.gz -C .venv-dist --strip-components 1 --one-top-level=sdist
	cd .venv-dist && bin/glem --help > help.txt
	cd .venv-dist && bin/glem generate bundled:fashion-mnist --per-class 1 --out samples
	cd .venv-dist/sdist && ../bin/python -m pytest -q --collect-only > ../collected.txt
	cd .venv-dist/sdist && ../bin/python -m pytest -q tests/test_house.py tests/test_io.py tests/model

# The documentation as a site. Once installed it builds without a network.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

.venv/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf site .venv .venv-floor .venv-dist demo-out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
