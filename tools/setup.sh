#!/usr/bin/env bash
# Creates .venv, installs what tests and benchmarks need and builds attnkern in place. Quick when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."
stop() { echo "attnkern: $*" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || stop "no $python was found; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || stop "Python 3.10 or newer is needed, $python is $("$python" -V 2>&1)"
"$python" -c 'import venv, ensurepip' 2>/dev/null || stop "$python has no venv module; install it (on Debian: apt-get install python3-venv)"

installed=.venv/.installed built=.venv/.built
if [ ! -e $installed ] || [ pyproject.toml -nt $installed ]; then
  free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free" -ge 12 ] || [ -e $installed ] || stop "12 GB of free disk are needed for .venv (PyTorch with CUDA and its cache), $free GB are free here"
  echo "attnkern: creating .venv and installing PyTorch, timm and the test tools (5 GB, about 8 minutes the first time)"
  [ -e .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install -q --upgrade pip || stop "pip could not reach a package index; check the network"
  # what pyproject.toml lists, without building attnkern yet
  .venv/bin/python -m pip install -q --progress-bar on $(.venv/bin/python tools/requirements.py) ||
    stop "installing the requirements failed; the lines above say which and why"
  # archives to read from, of one platform and Python whatever this is: they hold networks, not code that runs
  .venv/bin/python -m pip download -q --no-deps --only-binary :all: --python-version 3.11 --platform manylinux_2_28_x86_64 \
    -d .venv/wheels $(.venv/bin/python tools/requirements.py wheels) ||
    stop "downloading the wheels with the trained networks failed; the lines above say why"
  rm -f $built && touch $installed
fi

sources=$(git ls-files csrc CMakeLists.txt setup.py 2>/dev/null || find csrc CMakeLists.txt setup.py -type f)
newest=$(ls -t $sources | head -1)
if [ ! -e $built ] || [ "$newest" -nt $built ]; then
  compiler=${CXX:-$(command -v c++ || command -v g++ || command -v clang++ || true)}
  if [ -n "$compiler" ]; then
    header=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
    [ -e "$header" ] || stop "the Python headers are missing ($header); install them (on Debian: apt-get install python3-dev)"
  else
    echo "attnkern: no C++ compiler was found; install one (on Debian: apt-get install g++) for the native kernels. Going on with the reference alone."
  fi
  echo "attnkern: building the kernels (a few minutes; without nvcc the CUDA part is left out)"
  log=.venv/build.log
  .venv/bin/python -m pip install --no-build-isolation --no-deps -e . >$log 2>&1 || { tail -30 $log >&2; stop "the build failed; the whole log is in $log"; }
  grep -h '^ *attnkern: ' $log || true
  touch $built
fi
