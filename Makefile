# Four words: demo, test, check, bench. Each makes the environment it needs, once.
#   make test ARGS="-k moments"    make bench SUITE=recalibrate DATA=../shared/data
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
SUITE  ?= recalibrate
DATA   ?= ../shared/data
ARGS   ?=

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := src tests examples docs/made.py

# One thread for each test process: JOBS processes with a thread for every core each would only wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test check bench stubs lock clean
.DELETE_ON_ERROR:

demo: $(VENV)/core.stamp
	$(BIN)/renorm demo $(ARGS)

test: $(VENV)/test.stamp
	$(ONE_THREAD) $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=worksteal $(if $(ARGS),$(ARGS),--every-raise)

check: $(VENV)/dev.stamp
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	PATH=$(abspath $(BIN)):$$PATH PYTHONPATH=$(CURDIR)/src pyright --verifytypes renorm --ignoreexternal
	$(BIN)/codespell
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(CURDIR)/src $(BIN)/mkdocs build --strict --site-dir $(VENV)/site

bench: $(VENV)/test.stamp
	$(BIN)/renorm bench $(SUITE) --data $(DATA) $(ARGS)

# The stamps are younger than the two files that decide what is installed, or the install runs again.
$(VENV)/core.stamp: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): PyTorch is large, so this takes a few minutes, once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	touch $@

$(VENV)/test.stamp: $(VENV)/core.stamp
	$(INSTALL) --editable '.[test]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(INSTALL) --editable '.[dev]'
	touch $@

# What type checkers are told of the folders of methods and layers, which they cannot scan.
stubs: $(VENV)/core.stamp
	$(BIN)/python -c "from renorm.family import stub; from renorm.methods.base import Method; \
	print(stub('renorm.methods', Method), end='')" > $(VENV)/stub
	mv $(VENV)/stub src/renorm/methods/__init__.pyi
	$(BIN)/python -c "from renorm.family import stub; from renorm.layers import BESIDES; \
	from renorm.layers.base import Layer; print(stub('renorm.layers', Layer, *BESIDES), end='')" > $(VENV)/stub
	mv $(VENV)/stub src/renorm/layers/__init__.pyi
	$(BIN)/python -c "from renorm.family import stub; from renorm.regularisers.base import Regulariser; \
	print(stub('renorm.regularisers', Regulariser), end='')" > $(VENV)/stub
	mv $(VENV)/stub src/renorm/regularisers/__init__.pyi
	$(BIN)/python -c "from renorm.family import stub; from renorm.online.base import Online; \
	print(stub('renorm.online', Online), end='')" > $(VENV)/stub
	mv $(VENV)/stub src/renorm/online/__init__.pyi

# Take the newest versions of everything, then run the tests before committing the new constraints.
lock:
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[all,dev]'
	echo '# The versions that are tested, made by `make lock`. pyproject.toml has the floors.' > constraints.txt
	$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable >> constraints.txt
	touch $(VENV)/core.stamp $(VENV)/test.stamp $(VENV)/dev.stamp

clean:
	rm -rf $(VENV) build dist
