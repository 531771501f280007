// How lanes' operands become results; see `warp.h`. Compiled without sanitizers: lanes exchange through the scheduler's
// memory, which is no memory of the program under test.
#include "warp.h"

namespace emu {

namespace {

float widen_bf16(uint32_t pair, bool high) {
    const uint32_t bits = high ? pair & 0xffff0000u : pair << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

}  // namespace

void combine_mma_bf16(const Slot in[32], Slot out[32], unsigned) {
    float a[16][16], b[16][8];
    for (unsigned l = 0; l < 32; l++) {
        const auto x = from_slot<MmaOperands>(in[l]);
        const unsigned g = l >> 2, t = l & 3;
        for (unsigned h = 0; h < 2; h++) {
            for (unsigned r = 0; r < 4; r++) {
                a[g + (r & 1) * 8][2 * t + (r >> 1) * 8 + h] = widen_bf16(x.a[r], h);
            }
            for (unsigned r = 0; r < 2; r++) {
                b[2 * t + r * 8 + h][g] = widen_bf16(x.b[r], h);
            }
        }
    }
    float d[16][8];
    for (unsigned i = 0; i < 16; i++) {
        float sums[8] = {};
        for (unsigned k = 0; k < 16; k++) {
            for (unsigned j = 0; j < 8; j++) {
                sums[j] += a[i][k] * b[k][j];
            }
        }
        memcpy(d[i], sums, sizeof sums);
    }
    for (unsigned l = 0; l < 32; l++) {
        const unsigned g = l >> 2, t = l & 3;
        const float mine[4] = {d[g][2 * t], d[g][2 * t + 1], d[g + 8][2 * t], d[g + 8][2 * t + 1]};
        memcpy(&out[l], mine, sizeof mine);
    }
}

void combine_rows(const Slot in[32], Slot out[32], unsigned) {
    for (unsigned l = 0; l < 32; l++) {
        RowPointers rows;
        for (unsigned m = 0; m < 4; m++) {
            rows.row[m] = from_slot<const char*>(in[m * 8 + l / 4]);
        }
        out[l] = to_slot(rows);
    }
}

void combine_all_rows(const Slot in[32], Slot out[32], unsigned) {
    for (unsigned l = 0; l < 32; l++) {
        RowPointers rows;
        for (unsigned m = 0; m < 4; m++) {
            rows.row[m] = from_slot<const char*>(in[m * 8 + (l & 3) * 2]);
        }
        out[l] = to_slot(rows);
    }
}

void combine_next_rows(const Slot in[32], Slot out[32], unsigned) {
    for (unsigned l = 0; l < 32; l++) {
        RowPointers rows;
        for (unsigned m = 0; m < 4; m++) {
            rows.row[m] = from_slot<const char*>(in[m * 8 + (l & 3) * 2 + 1]);
        }
        out[l] = to_slot(rows);
    }
}

}  // namespace emu
