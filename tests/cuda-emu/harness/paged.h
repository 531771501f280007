// A paged cache with sequences in it, and attention over it in double precision.
//
// Owns the layout `[page][layer][K|V][kv_head][16][...]` as a test sees it: pages in random order, other layers'
// parts and unused token slots full of NaN, block tables that point nowhere beyond their sequence.
#pragma once
#include "harness.h"

namespace harness {

struct CacheShape {
    int kv_heads, head_dim;
    bool codes;                    // e4m3
    bool scales;                   // of e4m3, one for each head
    bool values_are_keys = false;  // the first elements of a key are its value
    int value_dim = 0;             // 0: as keys
};

class PagedCache {
  public:
    static constexpr int kLayers = 2, kLayer = 1;  // of which one is ours

    PagedCache(const CacheShape& shape, const std::vector<int>& contexts, Random& random)
        : shape_(shape), contexts_(contexts) {
        int pages = 1;  // page 0 is reserved
        for (int c : contexts) {
            pages += (c + 15) / 16;
            table_len_ = std::max(table_len_, (c + 15) / 16);
        }
        table_len_ = std::max(table_len_, 1);
        std::vector<uint32_t> order(pages - 1);
        for (int i = 0; i < pages - 1; i++) {
            order[i] = i + 1;
        }
        for (int i = pages - 2; i > 0; i--) {
            std::swap(order[i], order[random.below(i + 1)]);
        }
        tables_.assign(contexts.size() * table_len_, 0x00ffffff);
        size_t next = 0;
        for (size_t s = 0; s < contexts.size(); s++) {
            for (int b = 0; b < (contexts[s] + 15) / 16; b++) {
                tables_[s * table_len_ + b] = order[next++];
            }
        }
        bytes_.assign(static_cast<size_t>(pages) * page_bytes(), 0xff);
        scales_.resize(2 * shape.kv_heads, 1.0f);
        if (shape.scales) {
            for (float& s : scales_) {
                s = static_cast<float>(0.05 + 0.2 * random.unit());
            }
        }
    }

    void fill(Random& random, float key_spread) {
        for (size_t s = 0; s < contexts_.size(); s++) {
            for (int part = 0; part < (shape_.values_are_keys ? 1 : 2); part++) {
                for (int h = 0; h < shape_.kv_heads; h++) {
                    for (int i = 0; i < contexts_[s]; i++) {
                        for (int d = 0; d < dim(part); d++) {
                            set(s, part, h, i, d, random.normal() * (part ? 1.0f : key_spread));
                        }
                    }
                }
            }
        }
    }

    void set(size_t sequence, int part, int head, int token, int d, double x) {
        unsigned char* at = &bytes_[address(sequence, part, head, token, d)];
        if (shape_.codes) {
            *at = round_e4m3(x / scale(part, head)).bits;
        } else {
            const bf16 y = round_bf16(x);
            memcpy(at, &y, 2);
        }
    }
    double get(size_t sequence, int part, int head, int token, int d) const {
        return get(bytes_, sequence, part, head, token, d);
    }
    double get(const std::vector<unsigned char>& bytes, size_t sequence, int part, int head, int token, int d) const {
        const unsigned char* at = &bytes[address(sequence, part, head, token, d)];
        if (shape_.codes) {
            return value(e4m3{*at}) * scale(part, head);
        }
        bf16 y;
        memcpy(&y, at, 2);
        return value(y);
    }
    double scale(int part, int head) const { return scales_[part * shape_.kv_heads + head]; }
    const std::vector<int>& contexts() const { return contexts_; }
    const CacheShape& shape() const { return shape_; }
    const std::vector<unsigned char>& bytes() const { return bytes_; }
    int value_dim() const { return shape_.value_dim ? shape_.value_dim : shape_.head_dim; }
    // Bytes that changed although nothing here was `set`.
    long strays(const std::vector<unsigned char>& before, const std::vector<unsigned char>& after) const {
        long count = 0;
        for (size_t i = 0; i < before.size(); i++) {
            count += bytes_[i] == before[i] && after[i] != before[i];
        }
        return count;
    }
    size_t layer_bytes() const {
        const int elements = shape_.head_dim + (shape_.values_are_keys ? 0 : value_dim());
        return static_cast<size_t>(shape_.kv_heads) * 16 * elements * element();
    }
    size_t page_bytes() const { return kLayers * layer_bytes(); }
    const std::vector<uint32_t>& tables() const { return tables_; }
    const std::vector<float>& scales() const { return scales_; }
    int table_len() const { return table_len_; }

  private:
    int element() const { return shape_.codes ? 1 : 2; }
    int dim(int part) const { return part ? value_dim() : shape_.head_dim; }
    size_t address(size_t sequence, int part, int head, int token, int d) const {
        const size_t page = tables_[sequence * table_len_ + token / 16];
        const size_t keys = part ? static_cast<size_t>(shape_.kv_heads) * 16 * shape_.head_dim : 0;
        const size_t row = static_cast<size_t>(head) * 16 + token % 16;
        return page * page_bytes() + kLayer * layer_bytes() + (keys + row * dim(part) + d) * element();
    }

    CacheShape shape_;
    std::vector<int> contexts_;
    int table_len_ = 0;
    std::vector<uint32_t> tables_;
    std::vector<unsigned char> bytes_;
    std::vector<float> scales_;
};

// The cache on the device.
struct DeviceCache {
    Buffer<unsigned char> bytes;
    Buffer<uint32_t> tables;
    Buffer<float> scales;
    KvLayer layer;

    explicit DeviceCache(const PagedCache& cache)
        : bytes(cache.bytes()), tables(cache.tables()), scales(cache.scales()) {
        layer.pages = bytes.get() + PagedCache::kLayer * cache.layer_bytes();
        layer.tables = tables.get();
        layer.scales = cache.shape().scales ? scales.get() : nullptr;
        layer.page_bytes = cache.page_bytes();
        layer.table_len = static_cast<uint32_t>(cache.table_len());
        layer.kv_heads = static_cast<uint32_t>(cache.shape().kv_heads);
    }
};

struct AttentionRule {
    double scale;
    double cap;  // 0: none
    int window;  // 0: none
    bool causal = true;
    const std::vector<float>* sinks = nullptr;
};

}  // namespace harness

namespace reference {

// Attention of one query head at `position` (keys 0 to position, or all where not causal).
inline std::vector<double> attend(const harness::PagedCache& cache, size_t sequence, int head, int kv_head,
                                  int position, const std::vector<double>& q, const harness::AttentionRule& rule) {
    const int context = cache.contexts()[sequence], dim = cache.shape().head_dim, value_dim = cache.value_dim();
    const int end = rule.causal ? position + 1 : context;
    const int begin = rule.window ? std::max(0, position + 1 - rule.window) : 0;
    std::vector<double> scores;
    double peak = rule.sinks ? (*rule.sinks)[head] : -INFINITY;
    for (int i = begin; i < end; i++) {
        double s = 0;
        for (int d = 0; d < dim; d++) {
            s += q[d] * cache.get(sequence, 0, kv_head, i, d);
        }
        s *= rule.scale;
        if (rule.cap > 0) {
            s = rule.cap * tanh(s / rule.cap);
        }
        scores.push_back(s);
        peak = std::max(peak, s);
    }
    double sum = rule.sinks ? exp((*rule.sinks)[head] - peak) : 0;
    std::vector<double> out(value_dim, 0.0);
    for (int i = begin; i < end; i++) {
        const double w = exp(scores[i - begin] - peak);
        sum += w;
        const int part = cache.shape().values_are_keys ? 0 : 1;
        for (int d = 0; d < value_dim; d++) {
            out[d] += w * cache.get(sequence, part, kv_head, i, d);
        }
    }
    for (double& x : out) {
        x /= sum;
    }
    return out;
}

}  // namespace reference
