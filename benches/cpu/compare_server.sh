#!/usr/bin/env bash
# The whole server beside llama.cpp on the same machine, in the same run, on the same dtype: SmolLM2-135M's shape.
#
# Usage: compare_server.sh LLAMA_BIN_DIR GGUF_DIR [ROUNDS]
#   LLAMA_BIN_DIR  has llama-bench and llama-batched-bench, built natively (cmake -DCMAKE_BUILD_TYPE=Release)
#   GGUF_DIR       has what make_gguf.py wrote
# MIRAI names the release binary (default target/release/mirai).
#
# Ours is `mirai serve` with dummy weights, asked over HTTP by `mirai bench` on the same two cores: scheduler,
# sampling, detokenization and HTTP are inside the figure. Decode is BATCH / mean time per output token, prefill is
# 512 / median time to first token. Both sides take turns; the best round of each counts. Prints a Markdown table.
set -euo pipefail
llama=$1 gguf=$2 rounds=${3:-3}
threads=${THREADS:-2}
root=$(cd "$(dirname "$0")/../.." && pwd)
mirai=${MIRAI:-$root/target/release/mirai}
work=$(mktemp -d)
server=
cleanup() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap cleanup EXIT

# Weights are random, so any tokenizer that has a text for each of the 49,152 ids will do.
mkdir "$work/model"
cp "${TOKENIZER:-$root/../shared/data/tokenizers/llama3/tokenizer.json}" "$work/model/tokenizer.json"
cat >"$work/model/config.json" <<'JSON'
{"architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
 "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048,
 "rms_norm_eps": 1e-05, "rope_theta": 100000.0, "tie_word_embeddings": true, "hidden_act": "silu",
 "torch_dtype": "bfloat16"}
JSON

# start KIND: serves on a free port; sets url.
start() {
    local flags=()
    if [ "$1" != bf16 ]; then flags=(--quantization "$1"); fi
    "$mirai" serve --port 0 --model "$work/model" --load-format dummy --threads "$threads" --max-num-seqs 64 \
        --no-enable-prefix-caching --log-level warn "${flags[@]}" >"$work/out" &
    server=$!
    until grep -q '^ready' "$work/out"; do
        kill -0 "$server"
        sleep 0.1
    done
    url=$(sed -n 's/^listening on //p' "$work/out")
}

stop() {
    kill "$server"
    wait "$server"
    server=
}

# ask KIND NAME INPUT OUTPUT BATCH COUNT
ask() {
    "$mirai" bench --url "$url" --endpoint completions --dataset random --token-ids 32:250 --input-len "$3" --output-len "$4" \
        --concurrency "$5" --num-prompts "$6" --warmup 1 --json "$work/ours-$1-$2-$round.json" >/dev/null
}

for ((round = 0; round < rounds; round++)); do
    for kind in bf16 q8_0; do
        start $kind
        ask $kind prefill 512 1 1 4
        ask $kind 1 128 64 1 2
        ask $kind 8 128 64 8 8
        ask $kind 32 128 64 32 32
        stop
        model=$gguf/smollm2-135m-shape-$kind.gguf
        "$llama/llama-bench" -m "$model" -t "$threads" -p 512 -n 64 -r 2 >>"$work/bench-$kind" 2>/dev/null
        for fused in on off; do
            "$llama/llama-batched-bench" -m "$model" -t "$threads" -c 8192 -npp 128 -ntg 64 -npl 1,8,32 \
                -fa $fused >>"$work/batched-$kind" 2>/dev/null
        done
    done
done

python3 - "$work" "$rounds" <<'PY'
import glob, json, re, sys

work = sys.argv[1]


def ours(kind, name):
    best = 0.0
    for path in glob.glob(f"{work}/ours-{kind}-{name}-*.json"):
        run = json.load(open(path))
        assert run["failed"] == 0, path
        if name == "prefill":
            best = max(best, 512e3 / run["median_ttft_ms"])
        else:
            best = max(best, int(name) * 1e3 / run["mean_tpot_ms"])
    return best


def column(path, pattern, field):
    rows = [line.split("|") for line in open(path) if re.search(pattern, line)]
    return max(float(re.match(r"[\d.]+", row[field].strip())[0]) for row in rows)


print("| | mirai over HTTP, tokens/s | llama.cpp, tokens/s | ratio | bar |\n|---|---|---|---|---|")
for kind in ("bf16", "q8_0"):
    for name, bar in (("1", 0.7), ("8", 1.0), ("32", 1.0), ("prefill", 0.7)):
        if name == "prefill":
            what, theirs = "prefill of 512", column(f"{work}/bench-{kind}", r"pp512", 7)
        else:
            what = f"decode, batch {name}"
            theirs = column(f"{work}/batched-{kind}", rf"\| *128 \| *64 \| *{name} \|", 8)
            if name == "1":
                theirs = max(theirs, column(f"{work}/bench-{kind}", r"tg64", 7))
        mine = ours(kind, name)
        print(f"| {kind} {what} | {mine:.0f} | {theirs:.0f} | {mine / theirs:.2f} | {bar} |")
PY
