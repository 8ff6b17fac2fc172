#!/usr/bin/env bash
# Everything that needs a GPU, in shards of under 9 minutes each, under a Python that already has torch; no network.
#   make gpu                      every shard not yet done for this commit, in order
#   make gpu SHARD=bench-1        one shard
# A finished shard leaves build/gpu/<commit>/<shard>.log and is not run again; results go to bench/results/<gpu>/.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=540
benches=12  # subjects of two families, each with two torch.compile columns
emulated="tests/test_simt*.py tests/test_triton_interpret.py tests/test_triton_aot.py tests/test_runs*.py"  # minutes, and no GPU
stop() { echo "attnkern: $*" >&2; exit 1; }

gpu=$("$python" - <<'P'
import torch
if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA GPU")
print(torch.cuda.get_device_name().lower().replace("nvidia", "").split()[0])
P
) || stop "make gpu needs a Python whose torch sees a GPU: make gpu PYTHON=/path/to/python"
arch=$("$python" -c 'import torch; m, n = torch.cuda.get_device_capability(); print(f"{m}{n}{chr(97) if m == 9 else str()}-real")')
commit=$(git rev-parse --short HEAD 2>/dev/null || echo "tree")
state=build/gpu/$commit out=bench/results/$gpu
mkdir -p "$state" "$out"

shard_build() { ATTNKERN_CUDA=1 ATTNKERN_CUDA_ARCHITECTURES=$arch "$python" setup.py build_ext --inplace; }
shard_info() { "$python" -m attnkern info --run; }
shard_test() {
  "$python" -m pytest -q -n 6 --dist loadscope tests --ignore-glob "tests/test_bench*" \
    $(printf -- '--ignore %s ' $emulated) --junitxml "$out/tests.xml"
}
shard_emulated() { "$python" -m pytest -q -n 8 --dist worksteal $emulated --junitxml "$out/emulated.xml"; }

# A sanitizer counts only after it has found the fault planted for it.
sanitize() {
  local tool=$1 fault=$2
  nvcc -o "$state/planted" -lineinfo "-arch=sm_${arch%%[!0-9]*}" tests/gpu/planted.cu || return 1
  if compute-sanitizer --tool "$tool" --error-exitcode 7 "$state/planted" "$fault" >"$state/planted-$tool.log" 2>&1; then
    echo "$tool did not find the planted fault '$fault'"
    return 1
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 7 --launch-timeout 120 \
    "$python" tests/gpu/sanitize.py
}
shard_memcheck() { sanitize memcheck out-of-bounds; }
shard_racecheck() { sanitize racecheck race; }
shard_initcheck() { sanitize initcheck uninitialised; }
shard_synccheck() { sanitize synccheck divergent-barrier; }
bench() { "$python" -m bench --gpu --plain --out "$out" --shard "$1/$benches"; }

run() {
  local shard=$1 log=$state/$1.log
  [ -e "$log" ] && { echo "== $shard: done before"; return; }
  echo "== $shard"
  export -f sanitize bench shard_build shard_info shard_test shard_emulated shard_memcheck shard_racecheck shard_initcheck shard_synccheck
  export python arch state out benches emulated
  local command=shard_$shard
  case $shard in bench-*) command="bench ${shard#bench-}" ;; esac
  if timeout $limit bash -c "$command" 2>&1 | tee "$log.part"; then mv "$log.part" "$log"; else
    cp "$log.part" "$out/$shard.failed.log"
    echo "attnkern: shard $shard failed or ran past $limit s; its log is $out/$shard.failed.log" >&2
    failed="${failed:-} $shard"
  fi
}

shards="build info test emulated memcheck racecheck initcheck synccheck $(seq -f 'bench-%g' $benches)"
for shard in ${1:-$shards}; do
  run "$shard"
  [ "$shard" = build ] && [ -n "${failed:-}" ] && break
done
[ -z "${failed:-}" ] || stop "failed:$failed"
