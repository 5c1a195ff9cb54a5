#!/usr/bin/env bash
# Builds the package with every backend that this machine can build, installs it into the current
# Python environment, and says of each backend whether it was built, or why not.
#
#   bash scripts/build_kernels.sh [--dry-run] [further arguments of pip install]
#
# PYTHON names the interpreter; by default python, or python3 where there is no python.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)

dry_run=false
if [[ ${1-} == --dry-run ]]; then
  dry_run=true
  shift
fi

python=${PYTHON:-$(command -v python || command -v python3 || true)}
if [[ -z $python ]]; then
  echo "build_kernels.sh: no python was found; PYTHON=<interpreter> names one" >&2
  exit 1
fi

# Prints why a backend cannot be built here; nothing if it can.
why_not() {
  case $1 in
    cuda)
      if [[ ! -f $root/kernels/cuda/CMakeLists.txt ]]; then
        echo "this version has no CUDA kernels"
      elif ! command -v "${CUDACXX:-nvcc}" >/dev/null; then
        echo "${CUDACXX:-nvcc} was not found; put it on PATH or set CUDACXX"
      fi
      ;;
    ascend)
      if [[ ! -f $root/kernels/ascend/CMakeLists.txt ]]; then
        echo "this version has no Ascend kernels"
      elif [[ -z ${ASCEND_HOME_PATH-} || -z ${SOC_VERSION-} ]]; then
        echo "CANN is not initialised; source scripts/init_cann.sh <model> first"
      fi
      ;;
  esac
}

backends=(cpu cuda ascend)
declare -A why
command=("$python" -m pip install "$root")
for backend in "${backends[@]}"; do
  why[$backend]=$(why_not "$backend")
  if [[ $backend != cpu && -z ${why[$backend]} ]]; then
    command+=(-C "cmake.define.SELECT_ATTN_${backend^^}=ON")
  fi
done
command+=("$@")

status=0
if $dry_run; then
  echo "${command[*]}"
  outcome="would be built"
elif "${command[@]}"; then
  outcome="built"
else
  status=$?
  outcome="failed"
fi

for backend in "${backends[@]}"; do
  if [[ -n ${why[$backend]} ]]; then
    echo "$backend: skipped: ${why[$backend]}"
  else
    echo "$backend: $outcome"
  fi
done
exit "$status"
