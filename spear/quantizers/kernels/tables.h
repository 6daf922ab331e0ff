// Tables of inner products of centres and what is read from them directly.
#pragma once

#include "selector.h"

namespace spear {

struct Shape {
    const float* costs;
    const float* cross;
    int num, size;

    const float* cost(int64_t frame, int book) const { return costs + (frame * num + book) * size; }
    // Twice the inner products of all entries of `row` (lines) with all entries of `column`, K x K.
    const float* table(int row, int column) const {
        return cross + (static_cast<int64_t>(column) * num + row) * size * size;
    }
};

// out = base + (rows[0] + rows[1] + ...), from the left.
inline void add_rows(const float* const* rows, int count, const float* base, float* out, int size) {
    int k = 0;
    for (; k + 4 * kLanes <= size; k += 4 * kLanes) {
        Floats a{}, b{}, c{}, d{};
        for (int r = 0; r < count; ++r) {
            const Floats* row = reinterpret_cast<const Floats*>(rows[r] + k);
            a += row[0], b += row[1], c += row[2], d += row[3];
        }
        const Floats* from = reinterpret_cast<const Floats*>(base + k);
        Floats* to = reinterpret_cast<Floats*>(out + k);
        to[0] = from[0] + a, to[1] = from[1] + b, to[2] = from[2] + c, to[3] = from[3] + d;
    }
    for (; k < size; ++k) {
        float sum = 0.0f;
        for (int r = 0; r < count; ++r) sum += rows[r][k];
        out[k] = base[k] + sum;
    }
}

// Costs of all entries of `book` given the entries in `codes` of the `others` first codebooks but itself.
inline void given_costs(const Shape& shape, int64_t frame, int book, const int32_t* codes, int others, const float** rows, float* out) {
    int count = 0;
    for (int other = 0; other < others; ++other)
        if (other != book) rows[count++] = shape.table(other, book) + static_cast<int64_t>(codes[other]) * shape.size;
    add_rows(rows, count, shape.cost(frame, book), out, shape.size);
}

inline float error_of(const Shape& shape, int64_t frame, const int32_t* codes) {
    float error = 0.0f;
    for (int book = 0; book < shape.num; ++book) error += shape.cost(frame, book)[codes[book]];
    for (int first = 0; first < shape.num; ++first)
        for (int second = first + 1; second < shape.num; ++second)
            error += shape.table(first, second)[static_cast<int64_t>(codes[first]) * shape.size + codes[second]];
    return error;
}

inline int list_length(int num_merged, int size) {
    int twofold = 0;
    while (num_merged >> (twofold + 1)) ++twofold;
    return std::min(128, (size <= 16 ? 8 : 16) << (twofold / 2));
}

}  // namespace spear
