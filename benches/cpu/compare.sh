#!/usr/bin/env bash
# Speed beside llama.cpp on the same machine, in the same run, on the same dtype, for the SmolLM2-135M shape.
#
# Usage: compare.sh LLAMA_BIN_DIR GGUF_DIR [ROUNDS]
#   LLAMA_BIN_DIR  has llama-bench and llama-batched-bench, built natively (cmake -DCMAKE_BUILD_TYPE=Release)
#   GGUF_DIR       has what make_gguf.py wrote
# STEP may name a built `step` benchmark of crates/cpu; otherwise it is built. RUN may be a prefix (taskset, nice).
#
# Both sides take turns, and the best of all rounds counts for both: on a shared machine the least disturbed round says
# most about the code. Prints a Markdown table.
set -euo pipefail
llama=$1 gguf=$2 rounds=${3:-3}
threads=${THREADS:-2}
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${STEP:-}" ]; then
    STEP=$(cd "$root" && cargo bench -p mirai-cpu --bench step --no-run --message-format short 2>&1 |
        sed -n 's/.*Executable .*(\(.*\))/\1/p')
    STEP=$root/${STEP#"$root"/}
fi

for ((round = 0; round < rounds; round++)); do
    echo "round $((round + 1)) of $rounds" >&2
    ${RUN:-} "$STEP" "$threads" 160 >>"$work/ours"
    for kind in bf16 q8_0; do
        model=$gguf/smollm2-135m-shape-$kind.gguf
        ${RUN:-} "$llama/llama-bench" -m "$model" -t "$threads" -p 512 -n 64 -r 2 >>"$work/bench-$kind" 2>/dev/null
        # With and without its fused attention: whichever is faster here counts for llama.cpp.
        for fused in on off; do
            ${RUN:-} "$llama/llama-batched-bench" -m "$model" -t "$threads" -c 8192 -npp 128 -ntg 64 -npl 1,8,32 \
                -fa $fused >>"$work/batched-$kind" 2>/dev/null
        done
    done
done

# best FILE PATTERN FIELD: largest value of a column of the table rows that match.
best() {
    awk -F'|' -v pattern="$2" -v field="$3" \
        '$0 ~ pattern { v = $field + 0; if (v > max) max = v } END { printf "%.1f", max }' "$1"
}

# ours KIND ROWS TOKENS: largest tokens/s of that line.
ours() {
    awk -v kind="$1" -v rows="$2" -v tokens="$3" '
        tolower($1) == kind ":" { on = 1; next }
        /of weights$/ { on = 0 }
        on && $1 == rows && $2 == "x" && $3 == tokens ":" { if ($4 + 0 > max) max = $4 + 0 }
        END { printf "%.1f", max }' "$work/ours"
}

row() {
    awk -v what="$1" -v a="$2" -v b="$3" -v bar="$4" \
        'BEGIN { printf "| %s | %s | %s | %.2f | %s |\n", what, a, b, a / b, bar }'
}

grep -h -m1 'Avx\|Portable' "$work/ours"
grep -h 'read bandwidth' "$work/ours" | sort -k3 -n | tail -1
grep -h -m1 '^build' "$work/bench-bf16"
echo
echo "| | ours, tokens/s | llama.cpp, tokens/s | ratio | bar |"
echo "|---|---|---|---|---|"
for kind in bf16 q8_0; do
    one=$(best "$work/bench-$kind" 'tg64' 8)
    batched=$(best "$work/batched-$kind" '\\| *128 \\| *64 \\| *1 \\|' 9)
    one=$(awk -v a="$one" -v b="$batched" 'BEGIN { print (a > b ? a : b) }')
    row "$kind decode, batch 1" "$(ours $kind 1 1)" "$one" 0.7
    for batch in 8 32; do
        theirs=$(best "$work/batched-$kind" "\\\\| *128 \\\\| *64 \\\\| *$batch \\\\|" 9)
        row "$kind decode, batch $batch" "$(ours $kind $batch 1)" "$theirs" 1.0
    done
    row "$kind prefill of 512" "$(ours $kind 1 512)" "$(best "$work/bench-$kind" 'pp512' 8)" 0.7
done
