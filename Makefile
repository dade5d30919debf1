# `make demo` and `make test` are all a user needs; each prepares .venv on its first run.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test style quality fuzz bench gpu wheel clean

help:
	@echo 'make demo      train, export, run and verify adapters on a real model (a few minutes)'
	@echo 'make test      run the tests; ARGS="--slow -k merge" passes options to pytest'
	@echo 'make quality   check style and types; make style repairs what can be repaired'
	@echo 'make fuzz      fuzz every parser on 8,000 inputs; ARGS="adapter -max_total_time=3600" one for an hour'
	@echo 'make bench     run the benchmarks that take a few minutes and name the longer ones'
	@echo 'make gpu       run what needs an NVIDIA GPU; every piece whose dependency is missing says so'
	@echo 'make wheel     build dist/*.whl with the native parts inside; options in .ci/wheel'
	@echo 'make clean     remove .venv and caches'
	@echo 'PYTHON=python3.12 chooses the interpreter for .venv (3.10 or newer)'

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# one thread per worker: the suite is many small models, and two workers share the cores better than two thread pools
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# atheris is at hand for Linux on x86_64 and for some Pythons only
fuzz: $(STAMP)
	@$(BIN)/python -m pip install --quiet -c constraints.txt --only-binary :all: 'atheris>=2.3' \
	|| { echo 'fuzz: SKIPPED, atheris cannot be installed here'; exit 0; } \
	&& $(BIN)/python tests/fuzz/fuzz.py $(ARGS)

QUICK_BENCHMARKS := benchmarks/operator_cpu.py benchmarks/function_body.py benchmarks/training.py
bench: $(STAMP)
	@set -e; for script in $(QUICK_BENCHMARKS); do echo "== $$script"; $(BIN)/python "$$script"; done
	@echo 'Not run, for they take up to half an hour or several GB of disk (see benchmarks/README.md):'
	@printf '  $(BIN)/python %s\n' $(filter-out $(QUICK_BENCHMARKS),$(wildcard benchmarks/*.py))

gpu: $(STAMP)
	@mkdir -p build/gpu; rm -f build/gpu/tests.xml build/gpu/engine_checks.json; failed=0; \
	$(BIN)/python -m pytest tests/gpu -rs --junitxml=build/gpu/tests.xml $(ARGS) || failed=1; \
	$(BIN)/python benchmarks/gpu/run.py || failed=1; exit $$failed

wheel:
	@PYTHON=$(PYTHON) .ci/wheel

# installed again only when what it is made from changes; with a C++ compiler that builds the operator library, too
NATIVE := CMakeLists.txt $(wildcard plugins/core/* plugins/include/sdct/* plugins/onnxruntime/*)
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit("sdct_export needs Python 3.10 or newer; set PYTHON=..." if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,peft,plot]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
