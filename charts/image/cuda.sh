#!/bin/sh
# Fetches the pinned CUDA libraries that the server opens at run time, from NVIDIA's wheels, and checks them.
# usage: cuda.sh FOLDER
set -eu

folder=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
    --dest "$work" -r "$(dirname "$0")/cuda.txt"
mkdir -p "$folder/usr/lib/cuda" "$folder/usr/share/doc/cuda"
for wheel in "$work"/*.whl; do
    python3 -m zipfile -e "$wheel" "$work/unpacked"
done
for library in libcublasLt.so.13 libnccl.so.2; do
    find "$work/unpacked" -name "$library" -exec install -m 644 {} "$folder/usr/lib/cuda/" \;
    [ -e "$folder/usr/lib/cuda/$library" ] || { echo "cuda.sh: no $library in the wheels" >&2; exit 1; }
done
find "$work/unpacked" -type f -iname 'license*' -exec cat {} + > "$folder/usr/share/doc/cuda/copyright"
cp "$(dirname "$0")/cuda.txt" "$folder/usr/share/doc/cuda/wheels.txt"
du -shL "$folder/usr/lib/cuda" | cut -f1 > "$folder/usr/share/doc/cuda/size"
find "$folder" -exec touch -h -d "@${SOURCE_DATE_EPOCH:-0}" {} +
