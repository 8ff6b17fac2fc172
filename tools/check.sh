#!/usr/bin/env bash
# Style, types and architecture: what `make check` runs. `make format` repairs what the first three can repair.
set -uo pipefail
cd "$(dirname "$0")/.."
status=0
step() { echo "== $*"; "$@" || status=1; }
step .venv/bin/python -m ruff check .
step .venv/bin/python -m ruff format --check .
step .venv/bin/clang-format --dry-run --Werror $(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')
step .venv/bin/python -m mypy
step .venv/bin/python -m pytest -q tests/test_architecture.py
exit $status
