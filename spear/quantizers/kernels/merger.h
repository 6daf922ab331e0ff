// One round of the pairwise merge search; spear/quantizers/merge_search.py defines it.
#pragma once

#include "tables.h"

namespace spear {

constexpr int kProductFrames = 1024;  // whose products are held at once; each reads a share of all tables
constexpr int kMostSingles = 16;     // list_length(1) and list_length(2)

// Candidate lists of one frame: values (N, w), what each pair of lists adds (pairs, w, w), what a candidate of one list adds to the
// present tuple of another (N, N, w).
struct Lists {
    std::vector<float> own;
    float *values = nullptr, *products = nullptr, *present = nullptr;
    int num = 0, width = 0;

    static size_t floats_for(int num, int width) {
        return static_cast<size_t>(num) * width * (1 + num) + static_cast<size_t>(num) * (num - 1) / 2 * width * width + kLanes;
    }
    void shape_to(int lists, int length, float* place) {
        num = lists, width = length;
        values = place, present = values + num * width, products = present + static_cast<size_t>(num) * num * width;
    }
    void shape_to(int lists, int length) {
        if (own.size() < floats_for(lists, length)) own.resize(floats_for(lists, length));
        shape_to(lists, length, own.data());
    }
    float* value(int list) const { return values + list * width; }
    float* with(int list, int other) const { return present + (list * num + other) * width; }
    float* product(int first, int second) const {
        return products + static_cast<size_t>(first * (2 * num - first - 1) / 2 + second - first - 1) * width * width;
    }
};

// out[j] = even[e[j]] + odd[o[j]]; the lines have `length` values and may be read up to the next multiple of kLanes.
inline void add_columns(const float* even, const float* odd, const int32_t* e, const int32_t* o, int length, int width, float* out) {
    int j = 0;
#if defined(__AVX512F__)
    if (length <= 2 * kLanes) {
        const int more = length > kLanes ? kLanes : 0;
        const __m512 even0 = _mm512_loadu_ps(even), even1 = _mm512_loadu_ps(even + more);
        const __m512 odd0 = _mm512_loadu_ps(odd), odd1 = _mm512_loadu_ps(odd + more);
        for (; j + kLanes <= width; j += kLanes)
            _mm512_storeu_ps(out + j, _mm512_add_ps(_mm512_permutex2var_ps(even0, _mm512_loadu_si512(e + j), even1),
                                                    _mm512_permutex2var_ps(odd0, _mm512_loadu_si512(o + j), odd1)));
    }
#endif
    for (; j < width; ++j) out[j] = even[e[j]] + odd[o[j]];
}

// out[c] = line[places[c]]; may write up to the next multiple of kLanes, where `places` must be valid, too.
inline void pick(const float* line, const int32_t* places, int length, float* out) {
    int c = 0;
#if defined(__AVX512F__)
    for (; c < length; c += kLanes) _mm512_storeu_ps(out + c, _mm512_i32gather_ps(_mm512_loadu_si512(places + c), line, sizeof(float)));
#endif
    for (; c < length; ++c) out[c] = line[places[c]];
}

// Candidates of a pair of codebooks: the entries that occur in them, the present one last, and each candidate's places among these.
struct Pair {
    int32_t entries[2][2 * kLanes] = {};
    int32_t place[2][kMostSingles];
    int32_t present[2];  // place of the present entry: the number of the others

    // From candidates chosen[i] = e * width + o of two lists of entries.
    void fill(const int32_t* chosen, int count, const int32_t* const lists[2], int width, const int32_t* old) {
        for (int part = 0; part < 2; ++part) {
            int32_t rank[kMostSingles];
            uint32_t used = 0;
            for (int i = 0; i < count; ++i) used |= 1u << (part ? chosen[i] % width : chosen[i] / width);
            int number = 0;
            for (int k = 0; k < width; ++k)
                if (used >> k & 1) entries[part][number] = lists[part][k], rank[k] = number++;
            for (int i = 0; i < count; ++i) place[part][i] = rank[part ? chosen[i] % width : chosen[i] / width];
            entries[part][number] = old[part], present[part] = number;
            for (int k = number + 1; k % kLanes; ++k) entries[part][k] = old[part];
        }
    }
};

class Merger {
  public:
    Merger(const Shape& shape, size_t frames) : shape_(shape), pairs_(shape.num / 2) {
        const int num = shape.num, size = shape.size;
        width0_ = num > 1 ? std::min(list_length(1, size), size) : 1;
        width1_ = num > 2 ? std::min(list_length(2, size), width0_ * width0_) : 1;
        values0_.resize(frames * num * width0_), entries0_.resize(frames * num * width0_);
        values1_.resize(frames * pairs_ * width1_), candidates_.resize(frames * pairs_);
        stride_ = Lists::floats_for(pairs_, width1_);
        if (num > 2) lists_of_frames_.resize(std::min<size_t>(frames, kProductFrames) * stride_ + kLanes);
        given_.resize(size), rows_.resize(num), merged_.resize(kMostSingles * kMostSingles), found_.resize(num);
        chosen_.resize(kMostLength);
    }

    // One round for some frames, no more than announced; `codes` (all frames, C) are replaced. Leaves in `frames` those that changed.
    void round(std::vector<int64_t>& frames, int32_t* codes) {
        list_entries(frames, codes);
        if (shape_.num > 1) list_pairs(frames, codes);
        size_t changed = 0;
        for (size_t start = 0; start < frames.size(); start += kProductFrames) {
            const size_t stop = std::min(frames.size(), start + kProductFrames);
            if (shape_.num > 2) multiply_pairs(start, stop);
            for (size_t at = start; at < stop; ++at) {
                finish(at, at - start);
                int32_t* old = codes + frames[at] * shape_.num;
                if (std::equal(found_.begin(), found_.end(), old)) continue;
                std::copy(found_.begin(), found_.end(), old);
                frames[changed++] = frames[at];
            }
        }
        frames.resize(changed);
    }

  private:
    static constexpr int kMostLength = 128;
    struct Level {
        std::vector<int32_t> even, odd;  // which candidates of the level below each one merges, (N, w)
    };
    Shape shape_;
    int pairs_, width0_, width1_;
    size_t stride_;
    std::vector<float> values0_, values1_, lists_of_frames_, given_, merged_;
    std::vector<int32_t> entries0_, chosen_, found_;
    std::vector<Pair> candidates_;
    std::vector<const float*> rows_;
    std::vector<Level> levels_;
    Selector select_;
    Lists lists_, spare_[2];
    static constexpr int kWidth = 2 * kLanes;
    float small_[2][2][kMostSingles + 1][kWidth] = {};  // by codebook of p, codebook of q, entry, entry

    // Best single entries of every codebook, the others as they are.
    void list_entries(const std::vector<int64_t>& frames, const int32_t* codes) {
        const int num = shape_.num;
        for (int book = 0; book < num; ++book)
            for (size_t at = 0; at < frames.size(); ++at) {
                given_costs(shape_, frames[at], book, codes + frames[at] * num, num, rows_.data(), given_.data());
                int32_t* kept = &entries0_[(at * num + book) * width0_];
                float* values = &values0_[(at * num + book) * width0_];
                select_(given_.data(), shape_.size, width0_, kept);
                for (int i = 0; i < width0_; ++i) values[i] = given_[kept[i]];
            }
    }

    // Smallest of (left - left_given) + (right - right_given) + product, w x w: places in chosen_, all values in merged_.
    void merge(const float* left, const float* right, const float* left_given, const float* right_given, const float* product, int width, int keep) {
        if (static_cast<int>(merged_.size()) < width * width) merged_.resize(width * width);
        float rest[kMostLength];
        for (int j = 0; j < width; ++j) rest[j] = right[j] - right_given[j];
        for (int i = 0; i < width; ++i) {
            const float first = left[i] - left_given[i];
            for (int j = 0; j < width; ++j) merged_[i * width + j] = (first + rest[j]) + product[i * width + j];
        }
        select_(merged_.data(), width * width, keep, chosen_.data());
    }

    // Best pairs of entries of neighbouring codebooks.
    void list_pairs(const std::vector<int64_t>& frames, const int32_t* codes) {
        const int num = shape_.num, size = shape_.size, width = width0_;
        float product[kMostSingles * kMostSingles], even_given[kMostSingles], odd_given[kMostSingles];
        for (int pair = 0; pair < pairs_; ++pair) {
            const float* table = shape_.table(2 * pair, 2 * pair + 1);
            for (size_t at = 0; at < frames.size(); ++at) {
                const int32_t* old = codes + frames[at] * num + 2 * pair;
                const int32_t* even = &entries0_[(at * num + 2 * pair) * width];
                const int32_t* lists[2] = {even, even + width};
                const float* present = table + static_cast<int64_t>(old[0]) * size;
                for (int j = 0; j < width; ++j) odd_given[j] = present[lists[1][j]];
                for (int i = 0; i < width; ++i) {
                    const float* line = table + static_cast<int64_t>(even[i]) * size;
                    even_given[i] = line[old[1]];
                    for (int j = 0; j < width; ++j) product[i * width + j] = line[lists[1][j]];
                }
                const float* values = &values0_[(at * num + 2 * pair) * width];
                merge(values, values + width, even_given, odd_given, product, width, width1_);
                for (int i = 0; i < width1_; ++i) values1_[(at * pairs_ + pair) * width1_ + i] = merged_[chosen_[i]];
                candidates_[at * pairs_ + pair].fill(chosen_.data(), width1_, lists, width, old);
            }
        }
    }

    // What each two pairs of codebooks add, for all their candidates.
    void multiply_pairs(size_t start, size_t stop) {
        Lists lists;
        for (int p = 0; p < pairs_; ++p)
            for (int q = p + 1; q < pairs_; ++q)
                for (size_t at = start; at < stop; ++at) {
                    lists.shape_to(pairs_, width1_, &lists_of_frames_[(at - start) * stride_]);
                    multiply_pair(p, q, candidates_[at * pairs_ + p], candidates_[at * pairs_ + q], lists);
                }
        for (size_t at = start; at < stop; ++at)
            std::copy_n(&values1_[at * pairs_ * width1_], pairs_ * width1_, &lists_of_frames_[(at - start) * stride_]);
    }

    void multiply_pair(int p, int q, const Pair& first, const Pair& second, const Lists& lists) {
        auto& small = small_;
        const int64_t size = shape_.size;
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) {
                const float* table = shape_.table(2 * p + i, 2 * q + j);
                for (int r = 0; r <= first.present[i]; ++r)
                    pick(table + first.entries[i][r] * size, second.entries[j], second.present[j] + 1, small[i][j][r]);
            }
        const int width = width1_, length = std::max(second.present[0], second.present[1]) + 1;
        float *product = lists.product(p, q), *forth = lists.with(p, q), *back = lists.with(q, p);
        for (int i = 0; i <= width; ++i) {
            const int e = i < width ? first.place[0][i] : first.present[0], o = i < width ? first.place[1][i] : first.present[1];
            float lines[2][kWidth];
            for (int j = 0; j < 2; ++j)
                for (int c = 0; c < (length > kLanes ? kWidth : kLanes); ++c) lines[j][c] = small[0][j][e][c] + small[1][j][o][c];
            if (i < width) forth[i] = lines[0][second.present[0]] + lines[1][second.present[1]];
            add_columns(lines[0], lines[1], second.place[0], second.place[1], length, width, i < width ? product + i * width : back);
        }
    }

    // Merges the lists of one frame to the end; its codes (C) are in found_.
    void finish(size_t at, size_t slot) {
        if (shape_.num == 1) {
            found_[0] = entries0_[at];
            return;
        }
        int depth = 0;
        if (pairs_ > 1) {
            lists_.shape_to(pairs_, width1_, &lists_of_frames_[slot * stride_]);
            for (int length = 4; lists_.num > 1; length *= 2) merge_level(length, depth++);
        }
        found_[0] = 0;  // the one candidate left; from the top, replace it by its parts
        for (int num = 1, level = depth - 1; level >= 0; --level, num *= 2) {
            const int width = level == depth - 1 ? 1 : static_cast<int>(levels_[level].even.size()) / num;
            for (int list = num - 1; list >= 0; --list) {
                const int place = list * width + found_[list];
                found_[2 * list] = levels_[level].even[place], found_[2 * list + 1] = levels_[level].odd[place];
            }
        }
        for (int pair = pairs_ - 1; pair >= 0; --pair) {
            const Pair& candidates = candidates_[at * pairs_ + pair];
            const int place = found_[pair];
            for (int part = 0; part < 2; ++part) found_[2 * pair + part] = candidates.entries[part][candidates.place[part][place]];
        }
    }

    // Merges neighbouring lists of tuples into lists of tuples of `length` codes.
    void merge_level(int length, int depth) {
        const int num = lists_.num / 2, old_width = lists_.width;
        const int width = num > 1 ? std::min(list_length(length, shape_.size), old_width * old_width) : 1;
        if (static_cast<int>(levels_.size()) <= depth) levels_.resize(depth + 1);
        Level& level = levels_[depth];
        level.even.resize(num * width), level.odd.resize(num * width);
        Lists& next = spare_[depth % 2];
        next.shape_to(num, width);
        for (int p = 0; p < num; ++p) {
            const int even = 2 * p, odd = even + 1;
            merge(lists_.value(even), lists_.value(odd), lists_.with(even, odd), lists_.with(odd, even), lists_.product(even, odd), old_width, width);
            for (int i = 0; i < width; ++i) {
                next.value(p)[i] = merged_[chosen_[i]];
                level.even[p * width + i] = chosen_[i] / old_width, level.odd[p * width + i] = chosen_[i] % old_width;
            }
        }
        for (int p = 0; p < num; ++p)
            for (int q = p + 1; q < num; ++q) merge_products(level, p, q, next);
        lists_.shape_to(num, width, next.own.data());
    }

    // Products of merged candidates from those of their parts: lines first, then columns.
    void merge_products(const Level& level, int p, int q, const Lists& next) {
        const int old_width = lists_.width, width = next.width;
        const int32_t *even = &level.even[p * width], *odd = &level.odd[p * width];
        const float *ee = lists_.product(2 * p, 2 * q), *oe = lists_.product(2 * p + 1, 2 * q);
        const float *eo = lists_.product(2 * p, 2 * q + 1), *oo = lists_.product(2 * p + 1, 2 * q + 1);
        float lines[2][kMostLength], *product = next.product(p, q);
        for (int i = 0; i < width; ++i) {
            const int64_t e = static_cast<int64_t>(even[i]) * old_width, o = static_cast<int64_t>(odd[i]) * old_width;
            for (int j = 0; j < old_width; ++j) lines[0][j] = ee[e + j] + oe[o + j], lines[1][j] = eo[e + j] + oo[o + j];
            add_columns(lines[0], lines[1], &level.even[q * width], &level.odd[q * width], old_width, width, product + i * width);
        }
        mix_present(level, p, q, next), mix_present(level, q, p, next);
    }

    void mix_present(const Level& level, int p, int q, const Lists& next) {
        const float *ee = lists_.with(2 * p, 2 * q), *oe = lists_.with(2 * p + 1, 2 * q);
        const float *eo = lists_.with(2 * p, 2 * q + 1), *oo = lists_.with(2 * p + 1, 2 * q + 1);
        const int32_t *even = &level.even[p * next.width], *odd = &level.odd[p * next.width];
        float* to = next.with(p, q);
        for (int i = 0; i < next.width; ++i) to[i] = (ee[even[i]] + oe[odd[i]]) + (eo[even[i]] + oo[odd[i]]);
    }
};

}  // namespace spear
