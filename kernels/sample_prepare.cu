// Logits on their way to a draw: scale and cap, mask, edits, penalties; and the counts that penalties need.
//
//   sample_prepare:  in place, and partial results of each chunk of 4,096 ids. Grid (ceil(vocab / 4096), rows), 256
//   threads. counts_open:     a row of counts for a sequence: zero, prompt tokens marked, output tokens counted. Grid
//   1, 1024 threads.
//
// Order: copy for log-probabilities, mask, list of edits, penalties; arithmetic of edits in double precision, clamped
// to finite numbers, so that only a mask makes a token impossible. Bytes: 4 to 8 rows vocab; the floor is that over the
// bandwidth.

#include "sample.cuh"

// Nearest finite single.
PORT_FN float finite_single(double x) {
    constexpr double kLargest = 3.4028234663852886e38;
    return static_cast<float>(x > kLargest ? kLargest : x < -kLargest ? -kLargest : x);
}

PORT_FN float penalised(float logit, uint32_t count, const SampleRow& row) {
    if (count == 0 || logit == -kInfinity) {
        return logit;
    }
    const uint32_t in_output = count & ~kInPrompt;
    if (in_output == 0 && row.repetition == 1.0f) {
        return logit;
    }
    double x = logit;
    x = x > 0 ? x / row.repetition : x * row.repetition;
    x = x - static_cast<double>(row.frequency) * in_output - (in_output > 0 ? static_cast<double>(row.presence) : 0.0);
    return finite_single(x);
}

extern "C" __global__ void __launch_bounds__(256) sample_prepare(SampleArgs a) {
    PORT_SHARED(float, x, kChunkIds);
    PORT_SHARED(float, scratch, 32);
    PORT_SHARED(double, sums, 32);
    PORT_SHARED(unsigned long long, keys, 32);
    let_dependents_start();
    dependency_wait();
    const SampleRow row = a.rows[blockIdx.y];
    const uint32_t first = blockIdx.x * kChunkIds, t = threadIdx.x;
    const uint32_t length = smaller(static_cast<uint32_t>(kChunkIds), a.vocab - first);
    float* logits = a.logits + static_cast<size_t>(blockIdx.y) * a.stride + first;

    float peak = -kInfinity;
    bool finite = true;
    for (uint32_t i = t; i < length; i += blockDim.x) {
        float v = logits[i] * a.scale;
        if (a.cap > 0.0f) {
            v = a.cap * tanhf(v / a.cap);
        }
        finite = finite && is_finite(v);
        peak = fmaxf(peak, v);
        x[i] = v;
        if (row.raw_row >= 0) {
            a.raw[static_cast<size_t>(row.raw_row) * a.vocab + first + i] = v;
        }
    }
    peak = block_max(peak, scratch);
    const uint32_t fault = block_max(finite ? 0.0f : 1.0f, scratch) > 0.0f;
    double sum = 0;
    if (row.flags & kWantLogprobs) {
        for (uint32_t i = t; i < length; i += blockDim.x) {
            sum += weight_exp(x[i] - peak);
        }
    }
    sum = block_total(sum, sums);

    if (!(row.flags & kScore)) {
        if (row.mask_row >= 0) {
            const uint32_t* mask = a.masks + static_cast<size_t>(row.mask_row) * ((a.vocab + 31) / 32);
            for (uint32_t i = t; i < length; i += blockDim.x) {
                if (!(mask[(first + i) / 32] >> ((first + i) % 32) & 1)) {
                    x[i] = -kInfinity;
                }
            }
        }
        block_sync();
        for (uint32_t e = t; e < row.edits_count; e += blockDim.x) {
            const Edit edit = a.edits[row.edits_first + e];
            const uint32_t i = edit.token - first;
            if (edit.token < first || i >= length || x[i] == -kInfinity) {
                continue;
            }
            x[i] = edit.bias == -kInfinity ? -kInfinity : finite_single(static_cast<double>(x[i]) + edit.bias);
        }
        block_sync();
        if (row.counts_row >= 0) {
            const uint32_t* counts = a.counts + static_cast<size_t>(row.counts_row) * a.vocab + first;
            for (uint32_t i = t; i < length; i += blockDim.x) {
                x[i] = penalised(x[i], counts[i], row);
            }
        }
    }
    uint64_t best = 0;
    for (uint32_t i = t; i < length; i += blockDim.x) {
        logits[i] = x[i];
        best = larger(best, choice_key(x[i], static_cast<int>(first + i)));
    }
    best = block_largest(best, keys);
    if (t == 0) {
        a.chunks[static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x] = ChunkSums{sum, peak, fault, best};
    }
}

// tokens [prompt + output]: first those of the prompt, then the output's. 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
    counts_open(uint32_t* counts, const uint32_t* tokens, uint32_t prompt, uint32_t output, uint32_t vocab) {
    let_dependents_start();
    dependency_wait();
    for (uint32_t i = threadIdx.x; i < vocab; i += blockDim.x) {
        counts[i] = 0;
    }
    block_sync();
    for (uint32_t i = threadIdx.x; i < output; i += blockDim.x) {
        if (tokens[prompt + i] < vocab) {
            atomic_add(&counts[tokens[prompt + i]], 1u);
        }
    }
    for (uint32_t i = threadIdx.x; i < prompt; i += blockDim.x) {
        if (tokens[i] < vocab) {
            atomic_or(&counts[tokens[i]], kInPrompt);
        }
    }
}
