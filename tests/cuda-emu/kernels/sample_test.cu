// Sampling against a sort in double precision; where a decision is closer than rounding, a case does not count.
#include "../harness/harness.h"
#include "sample_prepare.cu"
#include "sample_draw.cu"

using namespace harness;

namespace {

struct Request {
    SampleRow row;
    std::vector<float> logits;
    std::vector<bool> allowed;  // empty: all
    std::vector<Edit> edits;
    std::vector<uint32_t> prompt, output;  // for the counts
};

SampleRow plain_row() {
    SampleRow r{};
    r.inverse_temperature = 1.0f;
    r.top_p = 1.0f;
    r.repetition = 1.0f;
    r.counts_row = r.mask_row = r.raw_row = -1;
    r.slot = ~0u;
    return r;
}

// Philox4x32-10, written from the paper once more.
double philox_uniform(uint64_t seed, uint32_t choice, uint32_t position) {
    uint32_t x0 = position, x1 = choice, x2 = 0, x3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < 10; i++) {
        const uint64_t a = uint64_t{0xd2511f53} * x0, b = uint64_t{0xcd9e8d57} * x2;
        const uint32_t y0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ k0, y2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ k1;
        x0 = y0, x1 = static_cast<uint32_t>(b), x2 = y2, x3 = static_cast<uint32_t>(a);
        k0 += 0x9e3779b9, k1 += 0xbb67ae85;
    }
    return static_cast<double>((uint64_t{x0} << 32 | x1) >> 11) / 9007199254740992.0;
}

std::vector<double> edited(const Request& q, const std::vector<double>& raw) {
    std::vector<double> x = raw;
    const SampleRow& r = q.row;
    const auto single = [](double v) {
        return static_cast<double>(static_cast<float>(std::clamp(v, -3.4028234663852886e38, 3.4028234663852886e38)));
    };
    for (size_t i = 0; i < x.size(); i++) {
        if (!q.allowed.empty() && !q.allowed[i]) {
            x[i] = -INFINITY;
        }
    }
    for (const Edit& e : q.edits) {
        if (x[e.token] != -INFINITY) {
            x[e.token] = isinf(e.bias) ? -INFINITY : single(x[e.token] + e.bias);
        }
    }
    if (r.counts_row < 0) {
        return x;
    }
    for (size_t i = 0; i < x.size(); i++) {
        const bool in_prompt = std::count(q.prompt.begin(), q.prompt.end(), i) > 0;
        const double count = static_cast<double>(std::count(q.output.begin(), q.output.end(), i));
        if (x[i] == -INFINITY || (count == 0 && !(in_prompt && r.repetition != 1.0f))) {
            continue;
        }
        const double v = x[i] > 0 ? x[i] / r.repetition : x[i] * r.repetition;
        x[i] = single(v - r.frequency * count - (count > 0 ? r.presence : 0.0));
    }
    return x;
}

struct Expected {
    int token;  // -1: too close to call
    uint32_t fault;
    double log_sum;
};

Expected expect_draw(const Request& q, const std::vector<double>& raw) {
    Expected e{-1, 0, 0};
    double raw_peak = -INFINITY;
    for (double v : raw) {
        if (!isfinite(v)) {
            e.fault = 1;
        }
        raw_peak = std::max(raw_peak, v);
    }
    for (double v : raw) {
        e.log_sum += exp(v - raw_peak);
    }
    e.log_sum = raw_peak + log(e.log_sum);
    if (e.fault) {
        return e;
    }
    const SampleRow& r = q.row;
    if (r.flags & kScore) {
        return e.token = static_cast<int>(r.token), e;
    }
    const auto x = edited(q, raw);
    std::vector<int> ids;
    for (size_t i = 0; i < x.size(); i++) {
        if (x[i] != -INFINITY) {
            ids.push_back(static_cast<int>(i));
        }
    }
    if (ids.empty()) {
        return e.fault = 2, e;
    }
    std::stable_sort(ids.begin(), ids.end(), [&](int a, int b) { return x[a] > x[b]; });
    if (r.flags & kGreedy) {
        return e.token = ids[0], e;
    }
    const double peak = x[ids[0]];
    const auto weight = [&](int id) {
        const double z = (x[id] - peak) * r.inverse_temperature;
        return z > -87 ? exp(z) : 0.0;
    };
    double margin = INFINITY;
    if (r.top_k > 0 && r.top_k < x.size() && ids.size() > r.top_k) {
        ids.resize(r.top_k);
    }
    if (r.min_p > 0) {
        for (int id : ids) {
            margin = std::min(margin, fabs(weight(id) / r.min_p - 1));
        }
        ids.erase(std::remove_if(ids.begin(), ids.end(), [&](int id) { return weight(id) < r.min_p; }), ids.end());
    }
    double total = 0;
    for (int id : ids) {
        total += weight(id);
    }
    if (r.top_p < 1) {
        double before = 0;
        size_t kept = 0;
        while (kept < ids.size() && (kept == 0 || before < r.top_p * total)) {
            before += weight(ids[kept++]);
            margin = std::min(margin, fabs(before / (r.top_p * total) - 1));
        }
        ids.resize(kept);
        total = before;
    }
    std::sort(ids.begin(), ids.end());
    const double at = philox_uniform(r.seed_low | uint64_t{r.seed_high} << 32, r.choice, r.position) * total;
    double seen = 0;
    for (int id : ids) {
        const double next = seen + weight(id);
        margin = std::min(margin, std::min(fabs(at - seen), fabs(at - next)) / total);
        if (at < next) {
            if (seen > 0 || weight(id) < total) {
                margin = std::min(margin, std::min(at == 0 ? 1.0 : fabs(at - seen), fabs(next - at)) / total);
            }
            e.token = margin < 2e-6 ? -1 : id;
            return e;
        }
        seen = next;
    }
    return e;
}

long undecided = 0, decided = 0;

void run(int vocab, std::vector<Request> requests, uint32_t max_top, float scale, float cap) {
    const int count = static_cast<int>(requests.size()), stride = vocab + 3,
              chunks = (vocab + kChunkIds - 1) / kChunkIds;
    const int words = (vocab + 31) / 32;
    std::vector<float> logits(static_cast<size_t>(count) * stride, NAN);
    std::vector<uint32_t> masks;
    std::vector<Edit> edits;
    std::vector<SampleRow> rows;
    int raw_rows = 0, mask_rows = 0, counts_rows = 0;
    for (int i = 0; i < count; i++) {
        Request& q = requests[i];
        std::copy(q.logits.begin(), q.logits.end(), logits.begin() + static_cast<size_t>(i) * stride);
        if (!q.allowed.empty()) {
            q.row.mask_row = mask_rows++;
            std::vector<uint32_t> mask(words, 0);
            for (int id = 0; id < vocab; id++) {
                mask[id / 32] |= static_cast<uint32_t>(q.allowed[id]) << id % 32;
            }
            masks.insert(masks.end(), mask.begin(), mask.end());
        }
        q.row.edits_first = static_cast<uint32_t>(edits.size());
        q.row.edits_count = static_cast<uint32_t>(q.edits.size());
        edits.insert(edits.end(), q.edits.begin(), q.edits.end());
        if (!q.prompt.empty() || !q.output.empty()) {
            q.row.counts_row = counts_rows++;
        }
        if (q.row.flags & kWantLogprobs && (!q.allowed.empty() || !q.edits.empty() || q.row.counts_row >= 0)) {
            q.row.raw_row = raw_rows++;
        }
        rows.push_back(q.row);
    }
    Buffer<float> d_logits(logits), d_raw(static_cast<size_t>(raw_rows) * vocab);
    Buffer<SampleRow> d_rows(rows);
    Buffer<Edit> d_edits(edits);
    Buffer<uint32_t> d_masks(masks), d_counts(static_cast<size_t>(counts_rows) * vocab),
        d_last(std::vector<uint32_t>(count, 7777777));
    Buffer<ChunkSums> d_chunks(static_cast<size_t>(count) * chunks);
    Buffer<SampleResult> d_results(count);
    Buffer<TopToken> d_tops(static_cast<size_t>(count) * max_top);
    std::vector<std::unique_ptr<Buffer<uint32_t>>> token_lists;
    for (const Request& q : requests) {
        if (q.row.counts_row < 0) {
            continue;
        }
        std::vector<uint32_t> list = q.prompt;
        list.insert(list.end(), q.output.begin(), q.output.end());
        token_lists.push_back(std::make_unique<Buffer<uint32_t>>(list));
        LAUNCH(counts_open, dim3(1), 1024, 0, d_counts.get() + static_cast<size_t>(q.row.counts_row) * vocab,
               token_lists.back()->get(), static_cast<uint32_t>(q.prompt.size()),
               static_cast<uint32_t>(q.output.size()), static_cast<uint32_t>(vocab));
    }
    const SampleArgs args{d_logits.get(),
                          d_raw.get(),
                          d_rows.get(),
                          d_edits.get(),
                          d_masks.get(),
                          d_counts.get(),
                          d_chunks.get(),
                          d_results.get(),
                          d_tops.get(),
                          d_last.get(),
                          static_cast<uint32_t>(vocab),
                          static_cast<uint32_t>(stride),
                          max_top,
                          scale,
                          cap};
    LAUNCH(sample_prepare, dim3(chunks, count), 256, 0, args);
    LAUNCH(sample_draw, dim3(count), kDrawThreads, 0, args, static_cast<uint32_t>(chunks));

    const auto results = d_results.download();
    const auto last = d_last.download();
    const auto tops = d_tops.download();
    const auto counts = d_counts.download();
    const auto prepared = d_logits.download();
    for (int i = 0; i < count; i++) {
        const Request& q = requests[i];
        const std::string name = "vocab " + std::to_string(vocab) + " row " + std::to_string(i);
        std::vector<double> raw(vocab);
        for (int id = 0; id < vocab; id++) {
            const float v = q.logits[id] * scale;
            raw[id] = cap > 0 ? static_cast<double>(cap * tanhf(v / cap)) : v;
        }
        const Expected e = expect_draw(q, raw);
        expect(name + " fault", results[i].fault == e.fault);
        if (e.fault) {
            if (q.row.slot != ~0u) {
                expect(name + " slot untouched", last[q.row.slot] == 7777777);
            }
            continue;
        }
        const auto want = q.row.flags & kScore ? raw : edited(q, raw);
        for (int id = 0; id < vocab; id++) {
            const double got = prepared[static_cast<size_t>(i) * stride + id];
            if (got != want[id] && !(isfinite(want[id]) && fabs(got - want[id]) <= 1e-6 * fabs(want[id]))) {
                mismatch(name + " edited", id, got, want[id]);
            }
        }
        const uint32_t token = results[i].token;
        (e.token < 0 ? undecided : decided)++;
        if (e.token >= 0 && static_cast<int>(token) != e.token) {
            mismatch(name + " token", 0, token, e.token);
        }
        if (token >= static_cast<uint32_t>(vocab)) {
            return mismatch(name + " token", 0, token, vocab);
        }
        if (q.row.slot != ~0u) {
            expect(name + " slot", last[q.row.slot] == ((q.row.flags & kScore) ? 7777777 : token));
        }
        if (q.row.counts_row >= 0) {
            const uint32_t held = counts[static_cast<size_t>(q.row.counts_row) * vocab + token];
            const uint32_t want =
                static_cast<uint32_t>(std::count(q.output.begin(), q.output.end(), token)) + !(q.row.flags & kScore);
            const bool in_prompt = std::count(q.prompt.begin(), q.prompt.end(), token) > 0;
            expect(name + " counts", held == (want | (in_prompt ? kInPrompt : 0)));
        }
        if (!(q.row.flags & kWantLogprobs)) {
            continue;
        }
        std::vector<int> order(vocab);
        for (int id = 0; id < vocab; id++) {
            order[id] = id;
        }
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return raw[a] > raw[b]; });
        expect(name + " rank", order[results[i].rank - 1] == static_cast<int>(token));
        expect(name + " logprob",
               fabs(results[i].logprob - (raw[token] - e.log_sum)) < 5e-6 * (1 + fabs(results[i].logprob)));
        for (uint32_t k = 0; k < std::min<uint32_t>({q.row.top, max_top, static_cast<uint32_t>(vocab)}); k++) {
            const TopToken& top = tops[static_cast<size_t>(i) * max_top + k];
            expect(name + " top " + std::to_string(k),
                   top.token == static_cast<uint32_t>(order[k]) &&
                       fabs(top.logprob - (raw[order[k]] - e.log_sum)) < 5e-6 * (1 + fabs(top.logprob)));
        }
    }
}

std::vector<Request> random_requests(Random& random, int vocab, int count) {
    std::vector<Request> out;
    for (int i = 0; i < count; i++) {
        Request q;
        q.row = plain_row();
        const float spreads[3] = {0.01f, 1.0f, 4.0f};
        const float spread = spreads[random.below(3)];
        const bool coarse = random.below(2);
        for (int id = 0; id < vocab; id++) {
            const float v = random.normal() * spread;
            q.logits.push_back(coarse ? roundf(v * 4) / 4 : v);
        }
        SampleRow& r = q.row;
        const float temperatures[3] = {0.3f, 1.0f, 2.0f}, top_ps[5] = {1.0f, 0.01f, 0.3f, 0.9f, 0.999f},
                    min_ps[4] = {0, 0, 0.05f, 0.6f};
        const uint32_t top_ks[6] = {0, 2, 5, 50, 700, 100000};
        r.inverse_temperature = 1.0f / temperatures[random.below(3)];
        r.top_p = top_ps[random.below(5)];
        r.min_p = min_ps[random.below(4)];
        r.top_k = top_ks[random.below(6)];
        r.seed_low = static_cast<uint32_t>(random.next());
        r.seed_high = static_cast<uint32_t>(random.next());
        r.choice = static_cast<uint32_t>(random.below(4));
        r.position = static_cast<uint32_t>(random.below(5000));
        r.slot = static_cast<uint32_t>(i);
        if (random.below(4) == 0) {
            r.flags |= kGreedy;
        }
        if (random.below(2)) {
            r.flags |= kWantLogprobs, r.top = static_cast<uint32_t>(random.below(21));
        }
        if (random.below(3) == 0) {
            for (int id = 0; id < vocab; id++) {
                q.allowed.push_back(random.below(3) > 0);
            }
        }
        if (random.below(2)) {
            for (int k = 0; k < std::min(vocab / 2, 40); k++) {
                q.edits.push_back({static_cast<uint32_t>(k * (vocab / std::min(vocab / 2, 40))),
                                   random.below(4) ? random.normal() * 3 : -INFINITY});
            }
        }
        if (random.below(2)) {
            for (int k = 0; k < 9; k++) {
                q.prompt.push_back(static_cast<uint32_t>(random.below(vocab)));
            }
            for (int k = 0; k < 12; k++) {
                q.output.push_back(static_cast<uint32_t>(random.below(std::min(vocab, 30))));
            }
            r.repetition = random.below(2) ? 1.0f : 1.3f;
            r.frequency = 0.4f;
            r.presence = 0.7f;
        }
        out.push_back(q);
    }
    return out;
}

// Rows with something wrong or extreme, among others.
std::vector<Request> odd_requests(int vocab) {
    std::vector<Request> out(8);
    for (size_t i = 0; i < out.size(); i++) {
        out[i].row = plain_row();
        out[i].row.slot = static_cast<uint32_t>(i);
        out[i].row.position = 3;
        out[i].logits.assign(vocab, 1.0f);
    }
    out[0].logits[vocab - 1] = NAN;
    out[1].logits[0] = INFINITY;
    out[2].allowed.assign(vocab, false);        // nothing allowed
    out[3].row.flags = kScore | kWantLogprobs;  // all equal: rank is the id's
    out[3].row.token = static_cast<uint32_t>(vocab / 2);
    out[3].row.top = 5;
    out[4].row.top_p = 1e-9f;  // one token stays, the first
    out[5].row.top_k = 3;      // ties at the cut go by id
    out[6].logits[vocab - 1] = -INFINITY;
    out[7].edits = {{static_cast<uint32_t>(vocab - 1), 3.0e38f}};  // far above the rest
    out[7].row.flags = kWantLogprobs;
    out[7].logits[vocab - 1] = 3.0e38f;
    out[7].row.top = 1;
    return out;
}

}  // namespace

int main() {
    Random random(5);
    run(70, random_requests(random, 70, 3), 20, 1.0f, 0.0f);
    run(33, odd_requests(33), 5, 1.0f, 0.0f);
    if (!small()) {
        for (int i = 0; i < 3; i++) {
            run(5000, random_requests(random, 5000, 16), 20, 1.0f, 0.0f);
        }
        run(4096, random_requests(random, 4096, 5), 8, 0.5f, 3.0f);
        run(9001, odd_requests(9001), 5, 1.0f, 0.0f);
        run(50021, random_requests(random, 50021, 3), 20, 1.0f, 0.0f);
    }
    printf("%ld draws compared, %ld too close to call\n", decided, undecided);
    expect("most draws can be told", decided > 4 * undecided);
    return report();
}
