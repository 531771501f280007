// From prepared logits to tokens, without a sort and without a value leaving the device.
//
//   sample_draw:  merges the chunks' results; greedy, or temperature, min-p, top-k, top-p and the draw;
//   log-probabilities
//                 of the token and of the most likely ones; the token into its slot. Grid (rows), 1024 threads.
//
// Tokens are ordered by (logit descending, id ascending), as 64-bit keys, all different. Top-k and top-p are one search
// for the key down to which counts, or weights, add up to a target: histograms over 11 bits of the key at a time, until
// one token is left. Weights are e^((logit - peak) / temperature) times 2^shift as integers, so sums do not depend on
// the order in which threads add: the same bits every time. The draw inverts the cumulative sum in the order of ids,
// with one Philox4x32-10 number from (seed, choice, position).
//
// Bytes: about 4 rows vocab for each pass (one if greedy, then about three for each of top-k, top-p, log-probabilities
// and the draw), from L2.

#include "sample.cuh"

constexpr int kDrawThreads = 1024;
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

// Philox4x32-10 (Salmon et al., SC 2011): a number in [0, 1) of 53 bits.
PORT_FN double uniform(const SampleRow& row) {
    uint32_t c[4] = {row.position, row.choice, 0, 0}, k[2] = {row.seed_low, row.seed_high};
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = wide_mul(0xd2511f53u, c[0]), p1 = wide_mul(0xcd9e8d57u, c[2]);
        const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
                                  static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
        for (int i = 0; i < 4; i++) {
            c[i] = next[i];
        }
        k[0] += 0x9e3779b9u;
        k[1] += 0xbb67ae85u;
    }
    const uint64_t bits = (uint64_t{c[0]} << 32 | c[1]) >> 11;
    return static_cast<double>(bits) * (1.0 / 9007199254740992.0);
}

// A row while it is drawn from: which tokens are kept, and what each weighs.
struct Drawer {
    const float* x;
    uint32_t vocab;
    float peak, inverse_temperature, min_p;
    double unit;   // 2^shift
    uint64_t cut;  // keys below it are out

    PORT_FN uint64_t key(uint32_t id) const { return choice_key(x[id], static_cast<int>(id)); }
    // 0: cannot be drawn.
    PORT_FN unsigned long long mass(uint32_t id) const {
        if (key(id) < cut) {
            return 0;
        }
        const float w = weight_exp(mul_rn(add_rn(x[id], -peak), inverse_temperature));
        return w < min_p ? 0 : static_cast<unsigned long long>(w * unit);
    }
};

struct SearchMemory {
    unsigned long long* weights;  // [kDigits]
    uint32_t* counts;             // [kDigits]
    unsigned long long* totals;   // [32]
    unsigned long long* answer;   // [3]
};

PORT_FN unsigned long long block_sum_exact(unsigned long long value, unsigned long long* scratch) {
    value = warp_sum(value);
    block_sync();
    if (lane_id() == 0) {
        scratch[threadIdx.x >> 5] = value;
    }
    block_sync();
    unsigned long long total = 0;
    for (unsigned w = 0; w < blockDim.x >> 5; w++) {
        total += scratch[w];
    }
    return total;
}

// Finds in the histogram, from the highest digit down, the one at which the sums reach `target`. Leaves the digit, what
// stood before it, and how many tokens it has.
PORT_FN void find_digit(const SearchMemory& m, unsigned long long target) {
    constexpr unsigned kEach = kDigits / kDrawThreads;
    const unsigned t = threadIdx.x, lane = lane_id(), warp = t >> 5;
    // Thread t has the digits from the top: kDigits - 1 - t * kEach downwards.
    unsigned long long mine = 0;
    for (unsigned i = 0; i < kEach; i++) {
        mine += m.weights[kDigits - 1 - t * kEach - i];
    }
    unsigned long long sum = mine;
#pragma unroll
    for (unsigned d = 1; d < 32; d <<= 1) {
        const unsigned long long below = shuffle_up(sum, d);
        if (lane >= d) {
            sum += below;
        }
    }
    block_sync();
    if (lane == 31) {
        m.totals[warp] = sum;
    }
    block_sync();
    unsigned long long before = sum - mine;
    for (unsigned w = 0; w < warp; w++) {
        before += m.totals[w];
    }
    if (before < target && before + mine >= target) {
        unsigned digit = kDigits - 1 - t * kEach;
        while (before + m.weights[digit] < target) {
            before += m.weights[digit--];
        }
        m.answer[0] = digit;
        m.answer[1] = before;
        m.answer[2] = m.counts[digit];
    }
    block_sync();
}

// The largest key such that tokens from it upwards weigh at least `target`; all of them do. `by_mass`: weights are
// masses, else every token at or above `d.cut` counts 1.
PORT_FN uint64_t search(const Drawer& d, bool by_mass, unsigned long long target, const SearchMemory& m) {
    uint64_t prefix = 0;
    for (int low = 64; low > 0;) {
        const int bits = smaller(kDigitBits, low);
        low -= bits;
        block_sync();
        for (unsigned i = threadIdx.x; i < kDigits; i += kDrawThreads) {
            m.weights[i] = 0;
            m.counts[i] = 0;
        }
        block_sync();
        const int above = low + bits;
        for (uint32_t id = threadIdx.x; id < d.vocab; id += kDrawThreads) {
            const uint64_t key = d.key(id);
            if (above < 64 && key >> above != prefix >> above) {
                continue;
            }
            const unsigned long long w = by_mass ? d.mass(id) : key >= d.cut;
            if (w == 0) {
                continue;
            }
            const unsigned digit = static_cast<unsigned>(key >> low) & ((1u << bits) - 1);
            atomic_add(&m.weights[digit], w);
            atomic_add(&m.counts[digit], 1u);
        }
        block_sync();
        find_digit(m, target);
        prefix |= static_cast<uint64_t>(m.answer[0]) << low;
        target -= m.answer[1];
        if (m.answer[2] == 1) {
            break;  // that one token, whatever the rest of its key
        }
    }
    return prefix;
}

// The first token, in the order of ids, up to which the masses exceed `target`.
PORT_FN uint32_t invert(const Drawer& d, unsigned long long target, const SearchMemory& m) {
    uint32_t begin = 0, end = d.vocab;
    const uint32_t warp = threadIdx.x >> 5, lane = lane_id();
    while (end - begin > 32) {
        const uint32_t piece = (end - begin + 31) / 32;
        const uint32_t from = smaller(begin + warp * piece, end), to = smaller(from + piece, end);
        unsigned long long sum = 0;
        for (uint32_t id = from + lane; id < to; id += 32) {
            sum += d.mass(id);
        }
        sum = warp_sum(sum);
        block_sync();
        if (lane == 0) {
            m.totals[warp] = sum;
        }
        block_sync();
        uint32_t w = 0;
        while (w < 31 && target >= m.totals[w]) {
            target -= m.totals[w++];
        }
        end = smaller(begin + (w + 1) * piece, end);
        begin = smaller(begin + w * piece, end);
    }
    uint32_t id = begin;
    while (id + 1 < end) {
        const unsigned long long w = d.mass(id);
        if (target < w) {
            break;
        }
        target -= w;
        id++;
    }
    return id;
}

PORT_FN uint32_t draw_token(Drawer& d, const SampleRow& row, const SearchMemory& m) {
    if (row.top_k > 0 && row.top_k < d.vocab) {
        d.cut = search(d, false, row.top_k, m);
    }
    unsigned long long total = 0;
    for (uint32_t id = threadIdx.x; id < d.vocab; id += kDrawThreads) {
        total += d.mass(id);
    }
    total = block_sum_exact(total, m.totals);
    if (row.top_p < 1.0f) {
        const double wanted = ceil(static_cast<double>(row.top_p) * static_cast<double>(total));
        const unsigned long long target = larger(1ull, smaller(total, static_cast<unsigned long long>(wanted)));
        d.cut = larger(d.cut, search(d, true, target, m));
        total = 0;
        for (uint32_t id = threadIdx.x; id < d.vocab; id += kDrawThreads) {
            total += d.mass(id);
        }
        total = block_sum_exact(total, m.totals);
    }
    const double at = floor(uniform(row) * static_cast<double>(total));
    return invert(d, smaller(total - 1, static_cast<unsigned long long>(at)), m);
}

// Log-probability and rank of a token, and the most likely tokens, under the raw logits.
PORT_FN void write_logprobs(const SampleArgs& a, const SampleRow& row, const float* raw, double log_sum, uint32_t token,
                            SampleResult* result, const SearchMemory& m) {
    Drawer d{raw, a.vocab, 0.0f, 0.0f, 0.0f, 0.0, 0};
    const uint64_t own = d.key(token);
    unsigned long long above = 0;
    for (uint32_t id = threadIdx.x; id < a.vocab; id += kDrawThreads) {
        above += d.key(id) > own;
    }
    above = block_sum_exact(above, m.totals);
    if (threadIdx.x == 0) {
        result->logprob = static_cast<float>(raw[token] - log_sum);
        result->rank = static_cast<uint32_t>(above) + 1;
    }
    const uint32_t top = smaller(smaller(row.top, a.max_top), a.vocab);
    if (top == 0) {
        return;
    }
    const uint64_t cut = search(d, false, top, m);
    block_sync();
    unsigned long long* found = m.weights;  // the histogram is done with
    if (threadIdx.x == 0) {
        m.counts[0] = 0;
    }
    block_sync();
    for (uint32_t id = threadIdx.x; id < a.vocab; id += kDrawThreads) {
        // Places are taken in any order; the order of the list is made below.
        if (d.key(id) >= cut) {
            found[count_in_block(&m.counts[0])] = d.key(id);
        }
    }
    block_sync();
    if (threadIdx.x < top) {
        const uint64_t mine = found[threadIdx.x];
        uint32_t place = 0;
        for (uint32_t i = 0; i < top; i++) {
            place += found[i] > mine;
        }
        const uint32_t id = static_cast<uint32_t>(choice_index(mine));
        a.tops[static_cast<size_t>(blockIdx.x) * a.max_top + place] =
            TopToken{id, static_cast<float>(raw[id] - log_sum)};
    }
}

extern "C" __global__ void __launch_bounds__(kDrawThreads) sample_draw(SampleArgs a, uint32_t chunks) {
    PORT_SHARED(unsigned long long, weights, kDigits);
    PORT_SHARED(uint32_t, counts, kDigits);
    PORT_SHARED(unsigned long long, totals, 32);
    PORT_SHARED(unsigned long long, answer, 3);
    PORT_SHARED(double, sums, 32);
    PORT_SHARED(float, peaks, 32);
    let_dependents_start();
    dependency_wait();
    const SampleRow row = a.rows[blockIdx.x];
    const ChunkSums* parts = a.chunks + static_cast<size_t>(blockIdx.x) * chunks;
    const float* x = a.logits + static_cast<size_t>(blockIdx.x) * a.stride;
    const SearchMemory memory{weights, counts, totals, answer};
    SampleResult* result = a.results + blockIdx.x;

    unsigned long long faults = 0;
    uint64_t best = 0;
    float raw_peak = -kInfinity;
    for (uint32_t c = threadIdx.x; c < chunks; c += kDrawThreads) {
        faults += parts[c].fault;
        best = larger(best, parts[c].best);
        raw_peak = fmaxf(raw_peak, parts[c].raw_peak);
    }
    faults = block_sum_exact(faults, totals);
    best = block_largest(best, totals);
    const uint32_t likeliest = static_cast<uint32_t>(choice_index(best));
    const bool nothing = !(row.flags & kScore) && x[likeliest] == -kInfinity;
    if (faults || nothing) {
        if (threadIdx.x == 0) {
            *result = SampleResult{0, faults ? 1u : 2u, 0.0f, 0};
        }
        return;
    }
    uint32_t token = row.token;
    if (!(row.flags & kScore)) {
        token = likeliest;
        if (!(row.flags & kGreedy)) {
            int shift = 62;
            while ((1ull << (62 - shift)) < a.vocab) {
                shift--;
            }
            Drawer d{x, a.vocab, x[likeliest], row.inverse_temperature, row.min_p, static_cast<double>(1ull << shift),
                     0};
            token = draw_token(d, row, memory);
        }
    }
    if (threadIdx.x == 0) {
        *result = SampleResult{token, 0, 0.0f, 0};
        if (!(row.flags & kScore) && row.slot != ~0u) {
            a.last_drawn[row.slot] = token;
        }
        if (!(row.flags & kScore) && row.counts_row >= 0) {
            a.counts[static_cast<size_t>(row.counts_row) * a.vocab + token]++;
        }
    }
    if (!(row.flags & kWantLogprobs)) {
        return;
    }
    raw_peak = block_max(raw_peak, peaks);
    double sum = 0;
    for (uint32_t c = threadIdx.x; c < chunks; c += kDrawThreads) {
        sum += parts[c].raw_sum * exp(static_cast<double>(parts[c].raw_peak) - raw_peak);
    }
    const double log_sum = raw_peak + log(block_total(sum, sums));
    const float* raw = row.raw_row >= 0 ? a.raw + static_cast<size_t>(row.raw_row) * a.vocab : x;
    write_logprobs(a, row, raw, log_sum, token, result, memory);
}
