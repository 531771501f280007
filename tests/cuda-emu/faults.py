#!/usr/bin/env python3
"""Fault injection: single edits in kernels, each of which the tests must notice.

Needs g++ and make, nothing else. Every fault is tried with the plain build in three orders, then with AddressSanitizer
and ThreadSanitizer, until something fails. Prints a table; exits 1 if fewer than 95 % are caught, or an edit no longer fits.

    python3 tests/cuda-emu/faults.py [--jobs N] [--only TEXT]
"""
import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"
EMULATION = HERE.parent.parent / "target" / "cuda-emu"
LEAST_CAUGHT = 0.95
LIMIT_S = 240

# (file, test, what is wrong, text, replacement). The text occurs once in the file, or the first occurrence is meant.
FAULTS = [
    ("norm.cu", "norm_test", "no dependency wait", "    dependency_wait();\n", ""),
    ("norm.cu", "norm_test", "post norm without its offset", "factor.x[j] + a.post_offset", "factor.x[j]"),
    ("norm.cu", "norm_test", "mean over vectors instead of elements", "mean = block_sum(sum, scratch) / a.width", "mean = block_sum(sum, scratch) / vectors"),
    ("norm.cu", "norm_test", "epsilon forgotten", "(block_sum(squares, scratch) / a.width + a.eps);\n\n", "(block_sum(squares, scratch) / a.width);\n\n"),
    ("norm.cu", "norm_test", "scale of the wrong group", "v * 8 / a.group] = scale", "v / a.group] = scale"),
    ("norm.cu", "norm_test", "last vector read beyond the row", "if (t + i * step < vectors) {\n            weight[i]", "if (t + i * step <= vectors) {\n            weight[i]"),
    ("norm.cu", "norm_test", "x scale forgotten", "float scale = a.x_scale;", "float scale = 1.0f;"),
    ("tile.cuh", "norm_test", "block sum without its second barrier", "scratch[threadIdx.x >> 5] = value;\n    }\n    block_sync();\n    return warp_sum(", "scratch[threadIdx.x >> 5] = value;\n    }\n    return warp_sum("),
    ("tile.cuh", "norm_test", "block sum without its first barrier", "    block_sync();  // scratch may still be read from the call before\n", ""),
    ("tile.cuh", "norm_test", "group maximum over half a group", "threads * 8 < group; threads", "threads * 16 < group; threads"),
    ("tile.cuh", "norm_test", "warp sum over 16 lanes", "for (unsigned d = 16; d > 0; d >>= 1) {\n        value += ", "for (unsigned d = 8; d > 0; d >>= 1) {\n        value += "),
    ("tile.cuh", "small_test", "gelu without the cubic term", "gate + 0.044715f * gate * gate * gate", "gate"),
    ("tile.cuh", "small_test", "slope of the clamped gate forgotten", "fast_exp(-spec.alpha * g)", "fast_exp(-g)"),
    ("tile.cuh", "small_test", "clamped up without the added 1", "* (u + 1.0f)", "* u"),
    ("port.cuh", "wrappers_test", "e4m3 rounds half up", "0x7ffffu + (magnitude >> 20 & 1)", "0x80000u"),
    ("port.cuh", "wrappers_test", "e4m3 overflows to NaN", "code > 0x7eu ? 0x7eu : code", "code > 0x7fu ? 0x7fu : code"),
    ("embed.cu", "small_test", "id of another row", "uint32_t id = ids[row]", "uint32_t id = ids[0]"),
    ("embed.cu", "small_test", "drawn token not looked up", "id = last_drawn[id & ~kFromSlot];", "id = id & ~kFromSlot;"),
    ("embed.cu", "small_test", "id beyond the vocabulary read", "id < vocab;", "id <= vocab;"),
    ("elementwise.cu", "small_test", "no dependency wait in add", "    dependency_wait();\n    const size_t at", "    const size_t at"),
    ("glu.cu", "small_test", "gate and up swapped", "activate(g.x[j], u.x[j], gate)", "activate(u.x[j], g.x[j], gate)"),
    ("glu.cu", "small_test", "row stride without up", "out + row * width + i, narrow8(gated8(x + row * 2 * width", "out + row * width + i, narrow8(gated8(x + row * width"),
    ("blocks.cu", "small_test", "pages copied to where they come from", "pool + to[blockIdx.x] * bytes;\n    const unsigned long long step = 16ull * blockDim.x * gridDim.y;\n    for (unsigned long long i = 16ull * (blockIdx.y * blockDim.x + threadIdx.x); i < bytes; i += step) {\n        store16(target + i, load", "pool + from[blockIdx.x] * bytes;\n    const unsigned long long step = 16ull * blockDim.x * gridDim.y;\n    for (unsigned long long i = 16ull * (blockIdx.y * blockDim.x + threadIdx.x); i < bytes; i += step) {\n        store16(target + i, load"),
    ("blocks.cu", "small_test", "last 16 bytes of a page forgotten", "i < bytes; i += step) {\n        store16(target + i, uint4", "i + 16 < bytes; i += step) {\n        store16(target + i, uint4"),
    ("rope_append.cu", "rope_append_test", "sine's sign", "a * cos[i] - b * sin[i]", "a * cos[i] + b * sin[i]"),
    ("rope_append.cu", "rope_append_test", "neighbouring pairs instead of halves", "head[i + half] = b", "head[i + 1] = b"),
    ("rope_append.cu", "rope_append_test", "no warp barrier after the load", "    warp_sync();\n    if (role == Role::Value) {", "    if (role == Role::Value) {"),
    ("rope_append.cu", "rope_append_test", "values to the keys' place", "append_head<kE4m3>(head, a, row, position, 1,", "append_head<kE4m3>(head, a, row, position, 0,"),
    ("rope_append.cu", "rope_append_test", "token's slot in the page by row", "position % kPageTokens * row_bytes", "token_in_page(position) * row_bytes"),
    ("rope_append.cu", "rope_append_test", "table of the first slot", "static_cast<size_t>(row.slot) * a.kv.table_len", "static_cast<size_t>(0) * a.kv.table_len"),
    ("rope_append.cu", "rope_append_test", "values normed and rotated like keys", "if (role == Role::Value) {\n        if (a.norm_values)", "if (role == Role::Value && a.norm_values) {\n        if (a.norm_values)"),
    ("rope_append.cu", "rope_append_test", "keys' norm for queries", "role == Role::Query ? a.q_norm : a.k_norm", "a.k_norm"),
    ("rope_append.cu", "rope_append_test", "a block too many of heads", "if (index >= all) {", "if (index > all) {"),
    ("tile.cuh", "rope_append_test", "heads of a page without its part", "(static_cast<unsigned long long>(part) * kv.kv_heads + head)", "(static_cast<unsigned long long>(part) + head)"),
    ("matmul_skinny.cu", "matmul_skinny_test", "no barrier at a stage", "            block_sync();  // all threads' copies of this stage are here, and the stage before is free\n", ""),
    ("matmul_skinny.cu", "matmul_skinny_test", "waits for one stage too few", "copy_wait<kStages - 2>();", "copy_wait<kStages - 1>();"),
    ("matmul_skinny.cu", "matmul_skinny_test", "ring refilled one stage early", "free_stage = (stage + kStages - 1) % kStages", "free_stage = (stage + kStages) % kStages"),
    ("matmul_skinny.cu", "matmul_skinny_test", "end of k read from the next row", "static_cast<unsigned>(smaller(left, 16))", "16u"),
    ("matmul_skinny.cu", "matmul_skinny_test", "fragments in another order than x", "{top.x, low.x, top.y, low.y}, {top.z", "{top.x, low.x, top.z, low.z}, {top.y"),
    ("matmul_skinny.cu", "matmul_skinny_test", "swizzle of x forgotten on one side", "const uint4 v = load16(x + (row * 8 + swizzled(row, chunk)) * 16);", "const uint4 v = load16(x + (row * 8 + chunk) * 16);"),
    ("matmul_skinny.cu", "matmul_skinny_test", "scales applied at every stage but not reset", "                    sums[m][n][i] = 0.0f;\n", ""),
    ("matmul_skinny.cu", "matmul_skinny_test", "last split dropped", "s < gridDim.y; s++", "s + 1 < gridDim.y; s++"),
    ("matmul_skinny.cu", "matmul_skinny_test", "counter left behind", "            a.counters[tile] = 0;\n", ""),
    ("matmul_skinny.cu", "matmul_skinny_test", "arrival before the sums are written", "        block_sync();\n        if (threadIdx.x == 0) {\n            *last = count_arrival", "        if (threadIdx.x == 0) {\n            *last = count_arrival"),
    ("matmul_skinny.cu", "matmul_skinny_test", "results over a ring that is still read", "        block_sync();  // the ring becomes the results\n", ""),
    ("matmul_skinny.cu", "matmul_skinny_test", "expert's rows of its neighbour", "a.offsets[expert], static_cast", "a.offsets[expert + 1], static_cast"),
    ("matmul_skinny.cu", "matmul_skinny_test", "early exit before the dependency wait", "        let_dependents_start();\n        dependency_wait();\n", "        if (a.experts && blockIdx.z > 3) return;\n        let_dependents_start();\n        dependency_wait();\n"),
    ("matmul.cuh", "matmul_skinny_test", "expert's bias forgotten", "task.bias += static_cast<size_t>(expert) * a.out", "task.bias += 0"),
    ("matmul.cuh", "matmul_skinny_test", "up of the gate's neighbour", "(r < kTile / 2 ? 0 : a.out / 2)", "(r < kTile / 2 ? 0 : a.out / 2 - 1)"),
    ("matmul.cuh", "matmul_skinny_test", "scale of k in blocks of 64", "k / 128 : 0", "k / 64 : 0"),
    ("matmul.cuh", "matmul_grouped_test", "pair's place instead of its token", "a.pairs[place] / static_cast<uint32_t>(a.top_k)", "a.pairs[place]"),
    ("matmul.cuh", "matmul_grouped_test", "odd last column written beyond the row", "return row < a.out ? row : -1;", "return row < a.out + 2 ? row : -1;"),
    ("matmul_grouped.cu", "matmul_grouped_test", "no barrier at a stage", "            block_sync();  // this stage is here, and the one before is done with\n", ""),
    ("matmul_grouped.cu", "matmul_grouped_test", "widened weights read without a barrier", "                widen(w, wide);\n                block_sync();\n", "                widen(w, wide);\n"),
    ("matmul_grouped.cu", "matmul_grouped_test", "rows of the tile's start not skipped", "a.offsets[expert] + skip", "a.offsets[expert]"),
    ("matmul_grouped.cu", "matmul_grouped_test", "x read beyond its rows", "const bool inside = row < task.rows && k < a.in;", "const bool inside = k < a.in;"),
    ("matmul_grouped.cu", "matmul_grouped_test", "halves of the weights' fragment swapped", "b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]", "b[n / 2][n % 2 * 2 + 1], b[n / 2][n % 2 * 2]"),
    ("moe_route.cu", "moe_route_test", "correction in the weights", "total += scores[best];", "total += scores[best] + (a.correction ? a.correction[best] : 0.0f);"),
    ("moe_route.cu", "moe_route_test", "an expert chosen twice", "if (best % 32 == l) {", "if (best % 32 == l && best > 40) {"),
    ("moe_route.cu", "moe_route_test", "groups by their best member alone", "size > 1 ? first + second : first", "first"),
    ("moe_route.cu", "moe_route_test", "one segment of the pairs forgotten", "segment < segments ? smaller(begin + length, count)", "segment < segments ? smaller(begin + length - 1, count)"),
    ("moe_route.cu", "moe_route_test", "sort begins before all tokens are routed", "count_arrival(a.counter) + 1 == gridDim.x", "count_arrival(a.counter) == 0"),
    ("moe_route.cu", "moe_route_test", "prefix sum without the barrier between", "    first_places[thread] = before;\n    block_sync();\n", "    first_places[thread] = before;\n"),
    ("moe_route.cu", "moe_route_test", "sum in places instead of pairs", "y + static_cast<size_t>(places[pair]) * width", "y + pair * width"),
    ("attention_decode.cu", "attention_decode_test", "window one too long", "static_cast<int>(row.context - a.window) : 0", "static_cast<int>(row.context - a.window) - 1 : 0"),
    ("attention_decode.cu", "attention_decode_test", "kv heads in turn", "* group + tile * kHeadTile;", "+ tile * kHeadTile;"),
    ("attention_decode.cu", "attention_decode_test", "sink lost", "if (a.sinks) {", "if (false) {"),
    ("attention_decode.cu", "attention_decode_test", "rows behind the context not cleared", "i / kPieces < live ? 16u : 0u", "16u"),
    ("attention_decode.cu", "attention_decode_test", "mask behind the context", "key >= from && key < to ?", "key >= from && key <= to ?"),
    ("attention_decode.cu", "attention_decode_test", "old output not shrunk", "o[i] *= shrink[i / 2];", "o[i] *= 1.0f;"),
    ("attention_decode.cu", "attention_decode_test", "team goes on without meeting", "            team_sync();  // this page is here, and the one before is done with\n", ""),
    ("attention_decode.cu", "attention_decode_test", "page not waited for", "            copy_wait<kStages - 2>();\n", "            copy_wait<kStages - 1>();\n"),
    ("attention_decode.cu", "attention_decode_test", "widened page read before it is whole", "widen_page(values, wide + kTile);\n                }\n                team_sync();", "widen_page(values, wide + kTile);\n                }"),
    ("attention_decode.cu", "attention_decode_test", "parts merged before all have come", "+ 1 == item.group_parts", "+ 2 == item.group_parts"),
    ("attention_decode.cu", "attention_decode_test", "next item overwrites this one's merge", "when they come here.\n        block_sync();\n", "when they come here.\n"),
    ("attention_decode.cu", "attention_decode_test", "soft-cap after the mask's scale", "x = a.cap * fast_tanh(x / a.cap)", "x = a.cap * fast_tanh(x)"),
    ("attention_decode.cu", "attention_decode_test", "value scale of the keys", "a.values_are_keys ? kv_head : a.kv.kv_heads + kv_head", "kv_head"),
    ("attention_prefill.cu", "attention_prefill_test", "a token sees the next", "a.causal ? position + 1 : context;\n        }", "a.causal ? position + 2 : context;\n        }"),
    ("attention_prefill.cu", "attention_prefill_test", "window of the block for each query", "state.from[r] = window && position + 1 > window ? position + 1 - window : 0;", "state.from[r] = from;"),
    ("attention_prefill.cu", "attention_prefill_test", "keys behind the block's last read", "key >= from && key < to;", "key >= from;"),
    ("attention_prefill.cu", "attention_prefill_test", "no barrier at a tile", "            block_sync();  // this tile is here, and the one before is done with\n", ""),
    ("attention_prefill.cu", "attention_prefill_test", "queries read before they are there", "        block_sync();  // queries are in shared memory\n", ""),
    ("attention_prefill.cu", "attention_prefill_test", "position of the token without the chunk's start", "const int position = start + query / group;", "const int position = query / group;"),
    ("attention_prefill.cu", "attention_prefill_test", "sum of one lane's keys", "            sum += shuffle_xor(sum, 2);\n", ""),
    ("attention_prefill.cu", "attention_prefill_test", "second half of the output written to the first", "* kDim + member() * kOwn;", "* kDim;"),
    ("sample_draw.cu", "sample_test", "top-p reached one token late", "ceil(static_cast<double>(row.top_p)", "1 + 1e-3 * static_cast<double>(total) + ceil(static_cast<double>(row.top_p)"),
    ("sample_draw.cu", "sample_test", "min-p against the logit", "return w < min_p ? 0", "return x[id] < min_p ? 0"),
    ("sample_draw.cu", "sample_test", "generator without the key's step", "        k[1] += 0xbb67ae85u;\n", ""),
    ("sample_draw.cu", "sample_test", "choice and position swapped", "{row.position, row.choice, 0, 0}", "{row.choice, row.position, 0, 0}"),
    ("sample_draw.cu", "sample_test", "temperature forgotten", "mul_rn(add_rn(x[id], -peak), inverse_temperature)", "add_rn(x[id], -peak)"),
    ("sample_prepare.cu", "sample_test", "presence penalty on prompt tokens", "(in_output > 0 ? static_cast<double>(row.presence) : 0.0)", "static_cast<double>(row.presence)"),
    ("sample_prepare.cu", "sample_test", "bias before the mask", "if (edit.token < first || i >= length || x[i] == -kInfinity) {", "if (edit.token < first || i >= length) {"),
    ("sample_draw.cu", "sample_test", "histogram not cleared in time", "            m.counts[i] = 0;\n        }\n        block_sync();\n", "            m.counts[i] = 0;\n        }\n"),
    ("sample_prepare.cu", "sample_test", "penalties before the edits are in", "        block_sync();\n        if (row.counts_row >= 0) {", "        if (row.counts_row >= 0) {"),
    ("sample_draw.cu", "sample_test", "log-probabilities of edited logits", "const float* raw = row.raw_row >= 0 ? a.raw", "const float* raw = row.raw_row >= 999 ? a.raw"),
    ("sample_prepare.cu", "sample_test", "not finite only where it is the largest", "finite = finite && is_finite(v);", "finite = finite && v < kInfinity;"),
    ("sample_draw.cu", "sample_test", "count of the drawn token forgotten", "* a.vocab + token]++;", "* a.vocab + token];"),
    ("sample_draw.cu", "sample_test", "search for the draw ends one piece early", "while (w < 31 && target >= m.totals[w])", "while (w < 31 && target > m.totals[w] + m.totals[w])"),
]

STAGES = [("plain", "fwd"), ("plain", "rev"), ("plain", "rand"), ("asan", "fwd"), ("tsan", "fwd"), ("tsan", "rand")]


def run(command, **more):
    return subprocess.run(command, capture_output=True, text=True, errors="replace", **more)


def environment(mode, order):
    env = {**os.environ, "EMU_ORDER": order, "EMU_SEED": "7", "ASAN_OPTIONS": "detect_leaks=0"}
    if mode == "tsan":
        env |= {"TEST_SMALL": "1", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    return env


def reason(result):
    for mark, word in [("EMU ERROR", "stopped"), ("data race", "race"), ("AddressSanitizer", "address"),
                       ("runtime error", "undefined"), ("MISMATCH", "value")]:
        if mark in result.stderr:
            return word
    return f"exit {result.returncode}"


def prepare(place, fault):
    """A copy of the kernels with one edit; None if the text is not there."""
    file, _, _, text, replacement = fault
    kernels = place / "kernels"
    shutil.copytree(KERNELS, kernels)
    source = (kernels / file).read_text()
    if text not in source:
        return None
    (kernels / file).write_text(source.replace(text, replacement, 1))
    if "token_in_page" in replacement:
        tile = (kernels / "tile.cuh").read_text()
        (kernels / "tile.cuh").write_text(tile + "\nPORT_FN uint32_t token_in_page(uint32_t p) { return (p + 1) % kPageTokens; }\n")
    return kernels


def attempt(fault):
    """How a fault was caught: (mode, order, reason), or None."""
    test = fault[1]
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        kernels = prepare(place, fault)
        if kernels is None:
            return ("edit", "-", "does not fit")
        built = None
        for mode, order in STAGES:
            binary = place / mode / test
            if built != mode:
                made = run(["make", "-s", "-C", str(HERE), f"KERNELS={kernels}", f"OUT={place}", f"EMU_OUT={EMULATION}", str(binary), "WARNINGS=-w"])
                if made.returncode:
                    return ("edit", "-", "does not compile: " + made.stderr.strip()[:300])
                built = mode
            try:
                result = run([str(binary)], env=environment(mode, order), timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                return (mode, order, "never ends")
            if result.returncode:
                return (mode, order, reason(result))
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=[""], help="faults whose file or name contains one of these")
    options = parser.parse_args()
    faults = [f for f in FAULTS if any(word in f[0] + " " + f[2] for word in options.only)]
    # Once, so that no two attempts build it at the same time.
    objects = [str(EMULATION / o) for o in ("scheduler.o", "blocks.o", "grids.o", "fiber.o", "warp.o",
                                              "plain/copy.o", "asan/copy.o", "tsan/copy.o")]
    subprocess.run(["make", "-s", "-C", str(HERE), f"OUT={EMULATION}", *objects], check=True)
    start = time.time()
    survivors, broken = [], []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for fault, caught in zip(faults, pool.map(attempt, faults)):
            words = "SURVIVES" if caught is None else " ".join(caught)
            print(f"{fault[0]:22} {fault[2]:52} {words}", flush=True)
            if caught is None:
                survivors.append(fault)
            elif caught[0] == "edit":
                broken.append(fault)
    tried = len(faults) - len(broken)
    caught = tried - len(survivors)
    print(f"{caught} of {tried} faults caught, {len(broken)} edits do not fit, {time.time() - start:.0f} s")
    return 1 if broken or caught < LEAST_CAUGHT * tried else 0


if __name__ == "__main__":
    sys.exit(main())
