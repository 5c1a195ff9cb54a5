#!/usr/bin/env bash
# Downloads and builds other libraries that select KV blocks on a CPU, for `bench --peers`:
#   bash scripts/build_peers.sh [FOLDER]     default: build/peers
# Exit status: 3 if the download fails.
#
# ktransformers 0.2.1.post1 is the last source distribution on PyPI whose block selection can be
# called (the wheels of its successor kt-kernel have it, but nothing that calls it). Only the files
# that select are compiled, with the flags of its own build.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/build/peers}
read -ra compiler <<<"${CXX:-g++}"
name=ktransformers-0.2.1.post1
url=https://files.pythonhosted.org/packages/ed/cd/7a125b0cf440967f32aff03caec44ced472e1ec21abae7778965ee7308f5/$name.tar.gz
sum=079ee36fbefe1280455f6cb2d9afaf840a9fed350acecdcf94f03b113aa94199

mkdir -p "$folder"
archive=$folder/$name.tar.gz
if ! sha256sum --check --status <<<"$sum  $archive" 2>/dev/null; then
  "${PYTHON:-python3}" - "$url" "$archive.part" <<'END' || exit 3
import pathlib, sys, urllib.request

with urllib.request.urlopen(sys.argv[1], timeout=60) as answer:
    pathlib.Path(sys.argv[2]).write_bytes(answer.read())
END
  sha256sum --check --quiet <<<"$sum  $archive.part" || exit 3
  mv "$archive.part" "$archive"
fi
tar --extract --gzip --directory "$folder" --file "$archive" \
  "$name/ktransformers/ktransformers_ext" "$name/third_party/llama.cpp" "$name/third_party/llamafile"

source=$folder/$name/ktransformers/ktransformers_ext
# What the linker drops, for nobody calls it, is what needs the rest of llama.cpp.
"${compiler[@]}" -std=c++17 -O3 -DNDEBUG -ffast-math -march=native -fPIC -shared -pthread -w \
  -fno-access-control -ffunction-sections -Wl,--gc-sections -Wl,--no-undefined \
  -I"$source" -I"$folder/$name/third_party" \
  -Wl,--version-script="$root/scripts/peers/exports.map" \
  "$root/scripts/peers/ktransformers.cc" "$source"/operators/kvcache/kvcache_{attn,utils}.cpp \
  "$source"/cpu_backend/backend.cpp -o "$folder/ktransformers.so"
echo "built $folder/ktransformers.so"
