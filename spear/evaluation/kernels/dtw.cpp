// Distances of sequences by dynamic time warping, many pairs at a time; called through spear/evaluation/dtw.py, which has the formulas.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// Mean cost over the cheapest path through costs (n, m); of equal steps the diagonal one is taken, then the one along m.
float path_mean(const float* costs, int64_t n, int64_t m, std::vector<float>& sums, std::vector<int32_t>& steps) {
    sums.resize(n * m);
    steps.resize(n * m);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < m; ++j) {
            const int64_t here = i * m + j;
            if (i == 0 && j == 0) {
                sums[here] = costs[here];
                steps[here] = 1;
                continue;
            }
            int64_t from;
            if (i == 0) {
                from = here - 1;
            } else if (j == 0) {
                from = here - m;
            } else {
                const float diagonal = sums[here - m - 1], left = sums[here - 1], up = sums[here - m];
                from = diagonal <= left && diagonal <= up ? here - m - 1 : left <= up ? here - 1 : here - m;
            }
            sums[here] = costs[here] + sums[from];
            steps[here] = steps[from] + 1;
        }
    }
    return sums[n * m - 1] / static_cast<float>(steps[n * m - 1]);
}

}  // namespace

extern "C" {

// frames (M, D); starts, lens (I,); pairs (P, 2) of items; out (P,). angular: frames have length 1 and cost is their angle over pi;
// else cost is the share of the D entries that differ.
void spear_dtw(const float* frames, int64_t dim, const int64_t* starts, const int64_t* lens, const int64_t* pairs, int64_t count, int32_t angular,
               float* out) {
    std::vector<float> turned, costs, sums;
    std::vector<int32_t> steps;
    int64_t held = -1;
    for (int64_t p = 0; p < count; ++p) {
        const int64_t first = pairs[2 * p], second = pairs[2 * p + 1], n = lens[first], m = lens[second];
        const float *a = frames + starts[first] * dim, *b = frames + starts[second] * dim;
        if (held != second) {  // (D, m), so that the inner loop runs over neighbours
            turned.resize(dim * m);
            for (int64_t j = 0; j < m; ++j)
                for (int64_t d = 0; d < dim; ++d) turned[d * m + j] = b[j * dim + d];
            held = second;
        }
        costs.assign(n * m, 0.0f);
        for (int64_t i = 0; i < n; ++i) {
            float* row = costs.data() + i * m;
            for (int64_t d = 0; d < dim; ++d) {
                const float value = a[i * dim + d];
                const float* column = turned.data() + d * m;
                if (angular)
                    for (int64_t j = 0; j < m; ++j) row[j] += value * column[j];
                else
                    for (int64_t j = 0; j < m; ++j) row[j] += value != column[j] ? 1.0f : 0.0f;
            }
        }
        for (float& cost : costs)
            cost = angular ? std::acos(std::clamp(cost, -1.0f, 1.0f)) * 0.318309886f : cost / static_cast<float>(dim);
        out[p] = path_mean(costs.data(), n, m, sums, steps);
    }
}
}
