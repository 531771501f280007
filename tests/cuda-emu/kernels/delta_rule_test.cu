// The gated delta net: convolution, recurrence and gated norm, over several steps.
#include "../harness/harness.h"
#include "delta_rule.cu"

#include "../harness/heads.h"

using namespace harness;

namespace {

struct Case {
    int k_heads, v_heads, k_dim, v_dim, taps;
    std::vector<std::vector<int>> steps;  // tokens of each row, step by step
    NormShape norm;
};

double sigmoid64(double x) { return 1 / (1 + exp(-x)); }

// One layer's states in double precision.
struct Layer {
    const Case& c;
    std::vector<float> conv, a_log, dt_bias;
    const TestNorm& norm;
    std::vector<double> history, state;

    int channels() const { return 2 * c.k_heads * c.k_dim + c.v_heads * c.v_dim; }

    std::vector<double> unit(const double* x) const {
        std::vector<double> out(x, x + c.k_dim);
        double squares = 1e-6;
        for (double v : out) {
            squares += v * v;
        }
        for (double& v : out) {
            v /= sqrt(squares);
        }
        return out;
    }

    std::vector<double> convolve(const double* x) {
        const int n = channels();
        history.insert(history.end(), x, x + n);
        std::vector<double> mixed(n);
        for (int i = 0; i < n; i++) {
            double sum = 0;
            for (int t = 0; t < c.taps; t++) {
                sum += history[t * n + i] * conv[i * c.taps + t];
            }
            mixed[i] = sum * sigmoid64(sum);
        }
        history.erase(history.begin(), history.begin() + n);
        return mixed;
    }

    // One token: its row of x to its row of out.
    std::vector<double> step(const std::vector<double>& x) {
        const int keys = c.k_heads * c.k_dim, values = c.v_heads * c.v_dim;
        const auto mixed = convolve(x.data());
        const double* z = &x[channels()];
        const double *b = z + values, *a = b + c.v_heads;
        std::vector<double> out;
        for (int h = 0; h < c.v_heads; h++) {
            const int k_head = h / (c.v_heads / c.k_heads);
            const auto q = unit(&mixed[k_head * c.k_dim]), k = unit(&mixed[keys + k_head * c.k_dim]);
            const double* v = &mixed[2 * keys + h * c.v_dim];
            const double decay = exp(-exp(static_cast<double>(a_log[h])) * log1p(exp(a[h] + dt_bias[h])));
            double* s = &state[static_cast<size_t>(h) * c.k_dim * c.v_dim];
            std::vector<double> o(c.v_dim, 0.0);
            for (int j = 0; j < c.v_dim; j++) {
                double read = 0;
                for (int i = 0; i < c.k_dim; i++) {
                    s[i * c.v_dim + j] *= decay;
                    read += k[i] * s[i * c.v_dim + j];
                }
                for (int i = 0; i < c.k_dim; i++) {
                    s[i * c.v_dim + j] += k[i] * sigmoid64(b[h]) * (v[j] - read);
                    o[j] += q[i] * s[i * c.v_dim + j] / sqrt(c.k_dim);
                }
            }
            const auto normed = norm.apply(o);
            for (int j = 0; j < c.v_dim; j++) {
                const double gate = z[h * c.v_dim + j];
                out.push_back(normed[j] * gate * sigmoid64(gate));
            }
        }
        return out;
    }
};

void run(const Case& c) {
    Random random(c.v_heads * 100 + c.k_dim + c.v_dim);
    const TestNorm norm(c.norm, c.v_dim, random);
    const int channels = 2 * c.k_heads * c.k_dim + c.v_heads * c.v_dim, values = c.v_heads * c.v_dim;
    const int width = channels + values + 2 * c.v_heads, stride = (width + 7) / 8 * 8,
              out_stride = (values + 7) / 8 * 8;
    const size_t conv_size = static_cast<size_t>(c.taps - 1) * channels;
    const size_t layer_size = conv_size + static_cast<size_t>(c.v_heads) * c.k_dim * c.v_dim,
                 slot_size = layer_size + 6;
    const size_t row_count = c.steps[0].size();
    std::vector<float> conv(channels * c.taps), a_log(c.v_heads), dt_bias(c.v_heads);
    for (float& v : conv) {
        v = random.normal() * 0.5f;
    }
    for (int h = 0; h < c.v_heads; h++) {
        a_log[h] = random.normal(), dt_bias[h] = random.normal();
    }
    // Rows have slots in another order; slot 0 is nobody's.
    std::vector<float> states((row_count + 1) * slot_size, NAN);
    std::vector<Layer> layers;
    for (size_t r = 0; r < row_count; r++) {
        Layer layer{
            c, conv, a_log, dt_bias, norm, std::vector<double>(conv_size), std::vector<double>(layer_size - conv_size)};
        float* slot = &states[(row_count - r) * slot_size];
        for (size_t i = 0; i < layer_size; i++) {
            slot[i] = random.normal() * 0.3f;
            (i < conv_size ? layer.history[i] : layer.state[i - conv_size]) = slot[i];
        }
        layers.push_back(layer);
    }
    Buffer<float> d_states(states), d_conv(conv), d_a_log(a_log), d_dt_bias(dt_bias);
    const std::string name = "delta heads " + std::to_string(c.k_heads) + " " + std::to_string(c.v_heads) + " dims " +
                             std::to_string(c.k_dim) + " " + std::to_string(c.v_dim);
    for (const std::vector<int>& lengths : c.steps) {
        std::vector<RowInfo> rows;
        uint32_t tokens = 0;
        for (size_t r = 0; r < row_count; r++) {
            const uint32_t n = static_cast<uint32_t>(lengths[r]);
            rows.push_back({static_cast<uint32_t>(row_count - r), tokens, n, n});
            tokens += n;
        }
        const auto x = random_bf16(random, static_cast<size_t>(tokens) * stride);
        Buffer<bf16> d_x(x), d_out(static_cast<size_t>(tokens) * out_stride);
        Buffer<RowInfo> d_rows(rows);
        DeltaArgs args{};
        args.x = d_x.get();
        args.out = d_out.get();
        args.rows = d_rows.get();
        args.states = d_states.get();
        args.conv = d_conv.get();
        args.a_log = d_a_log.get();
        args.dt_bias = d_dt_bias.get();
        args.norm = norm.args();
        args.slot_stride = slot_size;
        args.stride = stride;
        args.out_stride = out_stride;
        args.k_heads = c.k_heads;
        args.v_heads = c.v_heads;
        args.k_dim = c.k_dim;
        args.v_dim = c.v_dim;
        args.taps = c.taps;
        const unsigned threads = (static_cast<unsigned>(std::max(4 * c.v_dim, 2 * c.k_dim + c.v_dim)) + 31) / 32 * 32;
        LAUNCH(delta_rule_bf16, dim3(static_cast<unsigned>(c.v_heads), static_cast<unsigned>(row_count)), threads, 0,
               args);
        LAUNCH(delta_conv_state, dim3(static_cast<unsigned>((channels + 255) / 256), static_cast<unsigned>(row_count)),
               256, 0, args);
        std::vector<double> want;
        for (size_t r = 0; r < row_count; r++) {
            for (uint32_t t = 0; t < rows[r].tokens; t++) {
                std::vector<double> row(width);
                for (int i = 0; i < width; i++) {
                    row[i] = value(x[(rows[r].first + t) * stride + i]);
                }
                const auto out = layers[r].step(row);
                want.insert(want.end(), out.begin(), out.end());
            }
        }
        std::vector<bf16> got;
        bool zero = true;
        const auto out = d_out.download();
        for (size_t i = 0; i < out.size(); i++) {
            if (static_cast<int>(i % out_stride) < values) {
                got.push_back(out[i]);
            } else {
                zero = zero && out[i].bits == 0;
            }
        }
        expect_close(name, got, want);
        expect(name + ", zero behind rows", zero);
    }
    const auto after = d_states.download();
    std::vector<float> got;
    std::vector<double> want;
    bool others_stay = true;
    for (size_t s = 0; s <= row_count; s++) {
        for (size_t i = 0; i < slot_size; i++) {
            const float v = after[s * slot_size + i];
            if (s == 0 || i >= layer_size) {
                others_stay = others_stay && isnan(v);
                continue;
            }
            const Layer& layer = layers[row_count - s];
            got.push_back(v);
            want.push_back(i < conv_size ? layer.history[i] : layer.state[i - conv_size]);
        }
    }
    expect_close(name + " states", got, want, 1e-4);
    expect(name + ", other states", others_stay);
}

}  // namespace

int main() {
    const NormShape rms{NormKind::Rms}, none{};
    //   k heads, v heads, k dim, v dim, taps, {tokens of each row} for each step, norm
    run({1, 2, 6, 5, 4, {{3, 1}, {1, 2}, {0, 5}}, rms});
    run({2, 2, 16, 8, 2, {{2}, {1}}, rms});
    run({1, 1, 20, 24, 2, {{3}, {2}}, none});
    if (small()) {
        return report();
    }
    run({2, 4, 12, 20, 4, {{5, 0, 1}, {1, 1, 1}, {2, 7, 3}}, rms});
    run({1, 2, 128, 128, 4, {{9}, {1}, {1}}, rms});
    run({1, 3, 100, 33, 3, {{4, 2}, {1, 1}}, none});
    run({2, 2, 8, 8, 1, {{3}, {1}}, rms});
    run({1, 1, 64, 128, 8, {{2}, {10}, {1}}, rms});
    return report();
}
