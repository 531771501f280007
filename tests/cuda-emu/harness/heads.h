// Norms and rotations of heads, and the rows of a step, as tests of attention need them: for the device, and in double
// precision.
#pragma once
#include "heads.cuh"

#include "harness.h"

namespace harness {

struct NormShape {
    NormKind kind = NormKind::None;
    bool weight = true;
    bool bias = false;
};

class TestNorm {
  public:
    TestNorm(const NormShape& shape, int width, Random& random)
        : shape_(shape),
          weight_(random_bf16(random, width, 0.3f)),
          bias_(random_bf16(random, width, 0.5f)),
          d_weight_(weight_),
          d_bias_(bias_) {}

    HeadNorm args() const {
        return {shape_.weight ? d_weight_.get() : nullptr, shape_.bias ? d_bias_.get() : nullptr, kOffset, kEps,
                shape_.kind};
    }
    double weight(int i) const { return shape_.weight ? value(weight_[i]) + kOffset : 1; }

    std::vector<double> apply(std::vector<double> x) const {
        if (shape_.kind == NormKind::None) {
            return x;
        }
        double mean = 0, squares = 0;
        if (shape_.kind == NormKind::Layer) {
            for (double v : x) {
                mean += v / static_cast<double>(x.size());
            }
        }
        for (double v : x) {
            squares += (v - mean) * (v - mean);
        }
        const double size = sqrt(squares / static_cast<double>(x.size()) + kEps);
        for (size_t i = 0; i < x.size(); i++) {
            x[i] = (x[i] - mean) / size * weight(static_cast<int>(i)) + (shape_.bias ? value(bias_[i]) : 0);
        }
        return x;
    }

  private:
    static constexpr float kOffset = 0.75f, kEps = 1e-2f;
    NormShape shape_;
    std::vector<bf16> weight_, bias_;
    Buffer<bf16> d_weight_, d_bias_;
};

enum class Pairing { Halves, Adjacent, Apart };

struct RotationShape {
    int rotary = 0;  // 0: no rotation
    Pairing pairing = Pairing::Halves;
    int distance = 0;  // of Apart
    bool q_scale = false;
};

class TestRotation {
  public:
    TestRotation(const RotationShape& shape, int positions)
        : shape_(shape),
          cos_(table(shape, positions, false)),
          sin_(table(shape, positions, true)),
          q_scale_(shape.q_scale ? positions : 0),
          d_cos_(cos_),
          d_sin_(sin_) {
        for (size_t p = 0; p < q_scale_.size(); p++) {
            q_scale_[p] = 0.5f + 0.01f * static_cast<float>(p);
        }
        d_scale_ = std::make_unique<Buffer<float>>(q_scale_);
    }

    Rotation args() const {
        Rotation r{};
        if (shape_.rotary) {
            r = {d_cos_.get(),     d_sin_.get(), shape_.q_scale ? d_scale_->get() : nullptr, shape_.rotary, 1,
                 shape_.rotary / 2};
            if (shape_.pairing == Pairing::Adjacent) {
                r.step = 2, r.distance = 1;
            } else if (shape_.pairing == Pairing::Apart) {
                r.distance = shape_.distance;
            }
        }
        return r;
    }
    // The two elements of pair i.
    std::pair<int, int> pair(int i) const {
        switch (shape_.pairing) {
            case Pairing::Halves:
                return {i, i + shape_.rotary / 2};
            case Pairing::Adjacent:
                return {2 * i, 2 * i + 1};
            case Pairing::Apart:
                return {i, i + shape_.distance};
        }
        abort();
    }
    void rotate(double* head, int position) const {
        const int half = shape_.rotary / 2;
        for (int i = 0; i < half; i++) {
            const auto [first, second] = pair(i);
            const double cos = cos_[position * half + i], sin = sin_[position * half + i];
            const double a = head[first], b = head[second];
            head[first] = a * cos - b * sin;
            head[second] = b * cos + a * sin;
        }
    }
    // Elements that are rotated, ascending.
    std::vector<int> rotated() const {
        std::vector<int> out;
        for (int i = 0; i < shape_.rotary / 2; i++) {
            out.push_back(pair(i).first), out.push_back(pair(i).second);
        }
        std::sort(out.begin(), out.end());
        return out;
    }
    double scale(int position) const { return shape_.q_scale ? q_scale_[position] : 1; }

  private:
    static std::vector<float> table(const RotationShape& shape, int positions, bool sine) {
        const int half = shape.rotary / 2;
        std::vector<float> out(static_cast<size_t>(positions) * half);
        for (size_t i = 0; i < out.size(); i++) {
            const double angle = static_cast<double>(i / half) * pow(100.0, -static_cast<double>(i % half) / half);
            out[i] = static_cast<float>(1.2 * (sine ? sin(angle) : cos(angle)));
        }
        return out;
    }

    RotationShape shape_;
    std::vector<float> cos_, sin_, q_scale_;
    Buffer<float> d_cos_, d_sin_;
    std::unique_ptr<Buffer<float>> d_scale_;
};

// Rows of a step: `tokens` new ones of each sequence, up to its context. Row r is slot r.
struct StepRows {
    std::vector<RowInfo> rows;
    std::vector<uint32_t> positions, token_rows;

    StepRows(const std::vector<int>& contexts, const std::vector<int>& tokens) {
        for (size_t r = 0; r < tokens.size(); r++) {
            rows.push_back({static_cast<uint32_t>(r), static_cast<uint32_t>(positions.size()),
                            static_cast<uint32_t>(tokens[r]), static_cast<uint32_t>(contexts[r])});
            for (int i = 0; i < tokens[r]; i++) {
                positions.push_back(static_cast<uint32_t>(contexts[r] - tokens[r] + i));
                token_rows.push_back(static_cast<uint32_t>(r));
            }
        }
    }
    int count() const { return static_cast<int>(positions.size()); }
};

struct DeviceRows {
    Buffer<RowInfo> rows;
    Buffer<uint32_t> positions, token_rows;
    explicit DeviceRows(const StepRows& step)
        : rows(step.rows), positions(step.positions), token_rows(step.token_rows) {}
};

}  // namespace harness
