#!/usr/bin/env bash
# Checks and times everything on a machine with a GPU, in one run of less than ten minutes: tests,
# compute-sanitizer, benchmark, resources of the kernels. Needs no network and no nvcc.
#
#   bash scripts/gpu.sh [wheel]
#
# The package is the one that is installed, or the wheel, which is installed first. PYTHON names the
# interpreter; by default python, or python3 where there is no python. What is printed also goes to
# files in the folder that OUT names, out/gpu by default.
#
# A part that fails does not keep the others from running. Exit status: 0 if all went well, 1 if a
# part failed, 2 for wrong arguments, 3 if there is no GPU.
set -uo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 2
out=${OUT:-out/gpu}
deadline=$((SECONDS + ${SELECT_ATTN_GPU_SECONDS:-570}))

if [[ $# -gt 1 || ${1-} == -* ]]; then
  echo "usage: bash scripts/gpu.sh [wheel]" >&2
  exit 2
fi
python=${PYTHON:-$(command -v python || command -v python3 || true)}
if [[ -z $python ]]; then
  echo "gpu.sh: no python was found; PYTHON=<interpreter> names one" >&2
  exit 2
fi

refused=77 # status of a program that cannot be run on this device
summary=()
failed=0

note() { # <part> <outcome>
  summary+=("$(printf '%-24s %s' "$1" "$2")")
  echo "-- $1: $2"
}

# Runs a part for so many seconds at most, and within what is left of all; returns its status.
part() { # <part> <seconds> <command...>
  local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS status
  shift 2
  echo
  echo "== $name"
  if ((left < 5)); then
    note "$name" "FAILED: no time was left"
    failed=1
    return 1
  fi
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$out/${name// /_}.log"
  status=${PIPESTATUS[0]}
  if ((status == 0)); then
    note "$name" "passed in $((SECONDS - started)) s"
  elif ((status == refused)); then
    note "$name" "skipped: it does not accept this device"
  elif ((status == 124 || status == 137)); then
    note "$name" "FAILED: not done after $((SECONDS - started)) s"
    failed=1
  else
    note "$name" "FAILED with status $status after $((SECONDS - started)) s"
    failed=1
  fi
  return "$status"
}

skip() { # <part> <why>
  echo
  echo "== $1"
  note "$1" "skipped: $2"
}

finish() {
  echo
  echo "== summary, after $SECONDS s; all that was printed is in $out"
  printf '%s\n' "${summary[@]}"
  # A part has passed if it could measure; whether that is fast enough is for these to say.
  local log
  for log in "$out/lines.log" "$out/shapes.log"; do
    if [[ -f $log ]]; then sed -n '/^the table of speed$/,$p' "$log"; fi
  done
  exit "$failed"
}

# Prints a program of the CUDA toolkit: on PATH, in the toolkit, or what Python packages bring.
find_tool() {
  local folder
  command -v "$1" && return
  for folder in "${CUDA_HOME:-/usr/local/cuda}/bin" "${CUDA_HOME:-/usr/local/cuda}/compute-sanitizer" \
    "$("$python" -c 'import triton, os; print(os.path.dirname(triton.__file__))' 2>/dev/null)/backends/nvidia/bin"; do
    if [[ -x $folder/$1 ]]; then
      echo "$folder/$1"
      return
    fi
  done
  return 1
}

if ! why=$("$python" -c '
import sys
try:
    import torch
except (ImportError, OSError) as error:
    sys.exit(f"torch cannot be imported: {error}")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} finds no CUDA device")
' 2>&1); then
  echo "gpu.sh: nothing was run, for there is no GPU here: ${why##*$'\n'}" >&2
  exit 3
fi
mkdir -p "$out" || exit 2
rm -f "$out/info.log" "$out/lines.log" "$out/shapes.log" # of a run before

if [[ -n ${1-} ]]; then
  part "install" 60 "$python" -m pip install --quiet --disable-pip-version-check --no-index \
    --no-deps --force-reinstall "$1" || finish
fi

part "info" 60 "$python" -m select_attn_ops info
command -v nvidia-smi >/dev/null && nvidia-smi \
  --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit --format=csv
if ! grep -q '^backend cuda: available' "$out/info.log"; then
  note "backend" "FAILED: the installed package has no usable CUDA backend"
  failed=1
  finish
fi

if "$python" -c 'import pytest' 2>/dev/null; then
  tests=(experiments/[2-4]_*)
  part "experiments" 100 "$python" -m pytest -q --device cuda -m "not extensive and not large" \
    "${tests[@]}"
  if [[ -f tests/test_cuda.py ]]; then
    part "tests" 80 "$python" -m pytest -q tests/test_cuda.py
  else
    skip "tests" "there is no tests/test_cuda.py"
  fi
else
  skip "experiments" "pytest is not installed"
  skip "tests" "pytest is not installed"
fi

part "lines" 180 "$python" -m select_attn_ops bench --device cuda --suite gpu \
  --limit-seconds 150 --json "$out/lines.json"

# Each on small data, one call of every operator. initcheck sees all kernels, since it must know
# what those of torch have written, and is judged by ours; with the other tools ours are enough.
sanitize() { # <tool> <program>
  local report="$out/$1.txt" filter=(--kernel-name kns=_ZN11select_attn) status=0
  if [[ $1 == initcheck ]]; then filter=(); fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$2" --tool "$1" "${filter[@]}" --error-exitcode 9 \
    --log-file "$report" "$python" -m select_attn_ops bench --device cuda --check --quick \
    --suite gpu shapes --filter "$sweep" || status=$?
  tail -n 40 "$report"
  if grep -qiE 'devices? .*not supported|device not supported|no supported' "$report"; then
    return "$refused"
  fi
  if [[ $1 == initcheck && $status == 9 ]]; then
    ! grep -q 'select_attn' "$report"
    return
  fi
  return "$status"
}
sweep='gpu [136]|block size|values beside|ragged|tables'
export -f sanitize
export out python sweep refused
if sanitizer=$(find_tool compute-sanitizer); then
  for tool in memcheck racecheck initcheck synccheck; do
    part "$tool" 45 bash -c 'sanitize "$@"' bash "$tool" "$sanitizer"
  done
else
  skip "sanitizer" "compute-sanitizer was not found"
fi

resources() {
  local library
  library=$("$python" -c '
import select_attn_ops, pathlib
for folder in select_attn_ops.__path__:
    for path in pathlib.Path(folder, "lib").glob("libselect_attn_ops_cuda.so"):
        print(path)')
  "$1" --dump-resource-usage "$library" >"$out/resources.txt" || return
  echo "$(grep -c 'REG:' "$out/resources.txt") kernels of all architectures, in $out/resources.txt"
  echo "with a stack: $(grep -cE 'STACK:[1-9]' "$out/resources.txt")"
  echo "most registers: $(grep -oE 'REG:[0-9]+' "$out/resources.txt" | sort -t: -k2 -n | tail -1)"
}
export -f resources
if cuobjdump=$(find_tool cuobjdump); then
  part "resources" 30 bash -c 'resources "$@"' bash "$cuobjdump"
else
  skip "resources" "cuobjdump was not found"
fi

# What is left of the time goes to all other shapes, beside torch.
left=$((deadline - SECONDS))
if ((left > 60)); then
  part "shapes" "$left" "$python" -m select_attn_ops bench --device cuda \
    --suite speed original shapes context --limit-seconds $((left - 45)) --json "$out/shapes.json"
else
  skip "shapes" "$left s were left"
fi
finish
