// Rows that lie further apart than they are wide.
#pragma once
#include "harness.h"

namespace harness {

inline int row_stride(int width) { return (width + 7) / 8 * 8; }

// Spreads rows; `between` lies behind each.
template <class T>
std::vector<T> spread_rows(const std::vector<T>& rows, int width, int stride, T between) {
    const size_t count = rows.size() / width;
    std::vector<T> out(count * stride, between);
    for (size_t i = 0; i < rows.size(); i++) {
        out[i / width * stride + i % width] = rows[i];
    }
    return out;
}

// Takes rows out again; what lies behind each must be zero.
template <class T>
std::vector<T> gather_rows(const std::string& what, const std::vector<T>& rows, int width, int stride) {
    std::vector<T> out;
    bool zero = true;
    for (size_t i = 0; i < rows.size(); i++) {
        if (static_cast<int>(i % stride) < width) {
            out.push_back(rows[i]);
        } else {
            zero = zero && value(rows[i]) == 0;
        }
    }
    expect(what + ", zero behind rows", zero);
    return out;
}

}  // namespace harness
