# One line a target; `make` alone lists them.
PYTHON ?= python3
PY := .venv/bin/python
BENCH ?=
PYTEST ?=

.PHONY: help setup bench test check aot gpu format clean
help:    ## list the targets
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'
setup:   ## create .venv, install and build (quick when done)
	@PYTHON="$(PYTHON)" tools/setup.sh
bench: setup ## measure kernels and whole models (BENCH="--full" for all)
	$(PY) -m bench $(BENCH)
test: setup ## the whole test suite (PYTEST="-k layouts" for a part)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal tests $(PYTEST)
check: setup ## ruff, clang-format, mypy, architecture rules
	tools/check.sh
aot: setup ## registers, shared memory and spills of every GPU kernel and target
	$(PY) -m attnkern aot
gpu:     ## on a machine with a GPU: build, test, sanitizers, bench; resumable (SHARD=bench-1 for one shard)
	@PYTHON="$(PYTHON)" tools/gpu.sh $(SHARD)
format: setup ## rewrite Python and C++ in the house style
	$(PY) -m ruff check --fix-only -q . && $(PY) -m ruff format -q . && .venv/bin/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')
clean:   ## remove what setup and build made
	rm -rf .venv build attnkern/_C*.so *.egg-info bench/out
