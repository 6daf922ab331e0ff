// Picks the smallest of a list of numbers, in order of place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace spear {

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));
constexpr int kLanes = 16;

// Integers in the order of the numbers; both zeros are one.
inline int32_t key_of(float value) {
    value += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Of n keys, a multiple of kLanes.
inline int count_up_to(const int32_t* keys, int n, int32_t limit) {
    Ints counts{};
    for (int i = 0; i < n; i += kLanes) counts -= *reinterpret_cast<const Ints*>(keys + i) <= limit;
    int count = 0;
    for (int lane = 0; lane < kLanes; ++lane) count += counts[lane];
    return count;
}

// Keys up to `limit` and their places, in order. Writes up to 15 values past the end.
inline int compress(const int32_t* keys, int n, int32_t limit, int32_t* kept, int32_t* places) {
    int count = 0, i = 0;
#if defined(__AVX512F__)
    const __m512i bound = _mm512_set1_epi32(limit);
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + kLanes <= n; i += kLanes) {
        const __m512i key = _mm512_loadu_si512(keys + i);
        const __mmask16 mask = _mm512_cmple_epi32_mask(key, bound);
        _mm512_storeu_si512(kept + count, _mm512_maskz_compress_epi32(mask, key));
        _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(mask, place));
        count += __builtin_popcount(mask);
        place = _mm512_add_epi32(place, _mm512_set1_epi32(kLanes));
    }
#endif
    for (; i < n; ++i) {
        kept[count] = keys[i];
        places[count] = i;
        count += keys[i] <= limit;
    }
    return count;
}

class Selector {
  public:
    // Places of the `keep` smallest of n values in rising order of place; of equal values the first ones. n and keep are powers of two.
    void operator()(const float* values, int n, int keep, int32_t* chosen) {
        if (keep >= n) {
            for (int i = 0; i < n; ++i) chosen[i] = i;
            return;
        }
        reserve(n);
        for (int i = 0; i < n; ++i) keys_[i] = key_of(values[i]);
        if (keep == 1) {
            int32_t least = keys_[0];
            for (int i = 1; i < n; ++i) least = std::min(least, keys_[i]);
            int place = 0;
            while (keys_[place] != least) ++place;
            chosen[0] = place;
            return;
        }
        // The largest of `keep` minima of disjoint sets is no less than the value sought.
        int32_t* minima = minima_.data();
        std::copy_n(keys_.data(), keep, minima);
        if (keep % kLanes == 0) {
            for (int start = keep; start < n; start += keep)
                for (int i = 0; i < keep; i += kLanes) {
                    const Ints key = *reinterpret_cast<const Ints*>(&keys_[start + i]), least = *reinterpret_cast<const Ints*>(minima + i);
                    *reinterpret_cast<Ints*>(minima + i) = key < least ? key : least;
                }
        } else {
            for (int i = keep; i < n; ++i) minima[i % keep] = std::min(minima[i % keep], keys_[i]);
        }
        int32_t least = minima[0], most = minima[0];
        for (int i = 1; i < keep; ++i) least = std::min(least, minima[i]), most = std::max(most, minima[i]);
        const int found = compress(keys_.data(), n, most, kept_.data(), places_.data());
        if (found == keep) {
            std::copy_n(places_.data(), keep, chosen);
            return;
        }
        std::fill_n(kept_.data() + found, kLanes, INT32_MAX);
        take(found, keep, static_cast<int64_t>(least) - 1, most, chosen);
    }

  private:
    std::vector<int32_t> keys_, minima_, kept_, places_;

    void reserve(int n) {
        if (static_cast<int>(keys_.size()) >= n) return;
        for (auto* part : {&keys_, &minima_, &kept_, &places_}) part->resize(n + 2 * kLanes);
    }

    // Bisects for the bound: fewer than `keep` keys are up to `low`, at least `keep` up to `high`.
    void take(int found, int keep, int64_t low, int64_t high, int32_t* chosen) {
        const int whole = (found + kLanes - 1) / kLanes * kLanes;
        int ties = 0;
        while (true) {
            if (high - low == 1) {
                ties = keep - (low < INT32_MIN ? 0 : count_up_to(kept_.data(), whole, static_cast<int32_t>(low)));
                break;
            }
            const int64_t middle = low + (high - low) / 2;
            const int count = count_up_to(kept_.data(), whole, static_cast<int32_t>(middle));
            if (count == keep) {
                int at = 0;
                for (int i = 0; i < found && at < keep; ++i) {
                    chosen[at] = places_[i];
                    at += kept_[i] <= middle;
                }
                return;
            }
            (count > keep ? high : low) = middle;
        }
        for (int i = 0, at = 0; at < keep && i < found; ++i) {
            const bool tie = kept_[i] == high;
            if (kept_[i] < high || (tie && ties > 0)) chosen[at++] = places_[i];
            ties -= tie;
        }
    }
};

}  // namespace spear
