#!/bin/sh
# Runs parts of the GPU suite in the folder that `cargo xtask gpu-suite` has prepared:
#
#     OUT=results ./run.sh [--tiny] [ceilings] [contract] [goldens] [steps] [server]
#
# Each part ends within 9 minutes and writes $OUT/PART.json; the last thing printed is a table. Needs python3; nvcc and
# compute-sanitizer for `contract`, torch and transformers for the checkpoints of `goldens`.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
for packed in "$here"/bin/*.gz; do
    [ -e "$packed" ] || continue
    program=${packed%.gz}
    if [ ! -e "$program" ] || [ "$packed" -nt "$program" ]; then
        gzip -dc "$packed" > "$program.new"
        chmod +x "$program.new"
        mv "$program.new" "$program"
    fi
done
exec python3 "$here/suite.py" "$@"
