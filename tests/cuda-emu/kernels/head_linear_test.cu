// A weight for each head, at any place.
#include "../harness/harness.h"
#include "head_linear.cu"

using namespace harness;

namespace {

struct Case {
    int rows, heads, in, out;
    int x_first, x_gap, y_first, y_gap,
        behind;  // elements before the first head, from a head to the next, behind the last
};

void run(const Case& c) {
    Random random(c.rows * 100 + c.in + c.out);
    const int in_stride = (c.in + 7) / 8 * 8, x_head = c.in + c.x_gap, y_head = c.out + c.y_gap;
    const int x_stride = c.x_first + c.heads * x_head, width = c.y_first + c.heads * y_head + c.behind;
    const int y_stride = (width + 7) / 8 * 8;
    const size_t each = static_cast<size_t>(c.out + 1) * in_stride;  // and a row that is not ours
    const auto w = random_bf16(random, each * c.heads, 0.2f),
               x = random_bf16(random, static_cast<size_t>(c.rows) * x_stride);
    Buffer<bf16> d_w(w), d_x(x), d_y(static_cast<size_t>(c.rows) * y_stride);
    const HeadLinearArgs args{d_w.get(), d_x.get(), d_y.get(), each,   in_stride, c.rows,    c.in,  c.out,
                              width,     x_stride,  c.x_first, x_head, y_stride,  c.y_first, y_head};
    const dim3 grid(static_cast<unsigned>((c.out + kOutputs - 1) / kOutputs), static_cast<unsigned>(c.heads),
                    static_cast<unsigned>((c.rows + kRows - 1) / kRows));
    LAUNCH(head_linear_bf16, grid, 256, 0, args);
    const auto y = d_y.download();
    std::vector<bf16> got;
    std::vector<double> want;
    bool others_stay = true, zero = true;
    for (size_t i = 0; i < y.size(); i++) {
        const size_t row = i / y_stride;
        const int column = static_cast<int>(i % y_stride), head = (column - c.y_first) / y_head;
        const int o = column - c.y_first - head * y_head;
        if (column >= width) {
            zero = zero && y[i].bits == 0;
        } else if (column < c.y_first || head >= c.heads || o >= c.out) {
            others_stay = others_stay && y[i].bits == 0xffff;
        } else {
            double sum = 0;
            for (int k = 0; k < c.in; k++) {
                sum += value(x[row * x_stride + c.x_first + head * x_head + k]) *
                       value(w[each * head + static_cast<size_t>(o) * in_stride + k]);
            }
            got.push_back(y[i]);
            want.push_back(sum);
        }
    }
    const std::string name = "head linear in " + std::to_string(c.in) + " out " + std::to_string(c.out);
    expect_close(name, got, want);
    expect(name + ", others stay", others_stay);
    expect(name + ", zero behind rows", zero);
}

}  // namespace

int main() {
    run({1, 2, 6, 9, 0, 4, 0, 3, 0});
    run({9, 3, 13, 40, 5, 0, 2, 1, 4});
    if (small()) {
        return report();
    }
    run({8, 4, 128, 512, 0, 64, 0, 64, 0});
    run({3, 2, 512, 127, 64, 64, 0, 0, 1});
    run({20, 1, 1024, 33, 0, 0, 7, 0, 0});
    return report();
}
