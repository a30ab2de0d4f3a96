# make demo: the whole path in a few minutes.  make test: the tests.  Each sets up .venv first.
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(if $(shell $(name) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(name))))
BIN = .venv/bin

.PHONY: demo test long docs lint families mutants setup clean

demo: setup
	$(BIN)/python -m recipes.demo

test: setup
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not long"

# The tests that take seconds each: what is compiled, reports, pages in a browser, loggers, plans, reruns, ONNX, the Python of the documents.
long: setup
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n auto --dist worksteal -m long

# The site, in build/docs: a link that leads nowhere is an error.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]' --constraint constraints.txt
	$(BIN)/python -m sphinx -q -n -W --keep-going docs build/docs

# Hours: which small changes of the code the tests do not notice.  make mutants ONLY="adapters.methods.lora*"
mutants: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mutants]' --constraint constraints.txt
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/mutmut run --max-children 1 $(ONLY)
	$(BIN)/mutmut results

# Minutes: the tests with all their cases, of which both take some: every architecture of timm, every method compiled, exported and
# sharded, processes that die, the wheel; and the table of all families.
families: setup
	VITFT_ALL=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n auto --dist worksteal
	$(BIN)/python -m benchmarks.families

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

setup: .venv/done

.venv/done: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Error: vitft needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	touch $@

clean:
	rm -rf .venv runs/demo
