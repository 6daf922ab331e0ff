// Compiled loops of spear/quantizers/search.py, which defines every result; both return the same codes.
//
// C codebooks of K entries. costs: (frames, C * K), cross: (C, C * K, K), codes: (frames, C), all contiguous. Sums are formed in
// the order that the Python file states and nothing is contracted, so that results do not depend on the compiler or processor.
// Loops over tables are outermost and frames inside them: a table of K x K values stays in the cache while all frames read it.

#include "merger.h"

using namespace spear;

constexpr int64_t kChunkFrames = 2048;  // searched together, so that tables are read while they are in the cache


extern "C" {

// `iters` rounds of the pairwise merge search, frames stopped where a round changes nothing. With `errors` (frames), the best of all
// rounds and of the start is kept and its error, less the squared norm of the frame, goes there.
void spear_refine(const float* costs, const float* cross, int32_t* codes, int64_t frames, int32_t num, int32_t size, int32_t iters, float* errors) {
    const Shape shape{costs, cross, num, size};
    Merger merger(shape, std::min(frames, kChunkFrames));
    std::vector<int64_t> active;
    std::vector<int32_t> best;
    for (int64_t start = 0; start < frames; start += kChunkFrames) {
        const int64_t stop = std::min(frames, start + kChunkFrames);
        active.clear();
        for (int64_t frame = start; frame < stop; ++frame) active.push_back(frame);
        if (errors) {
            best.assign(codes + start * num, codes + stop * num);
            for (int64_t frame = start; frame < stop; ++frame) errors[frame] = error_of(shape, frame, codes + frame * num);
        }
        for (int iter = 0; iter < iters && !active.empty(); ++iter) {
            merger.round(active, codes);
            if (!errors) continue;
            for (int64_t frame : active) {
                const float error = error_of(shape, frame, codes + frame * num);
                if (error < errors[frame]) {
                    errors[frame] = error;
                    std::copy_n(codes + frame * num, num, best.data() + (frame - start) * num);
                }
            }
        }
        if (errors) std::copy(best.begin(), best.end(), codes + start * num);
    }
}

// Coordinate descent: each codebook in turn takes its best entry given the others, `sweeps` times over. With `fresh`, the given codes
// are ignored and the first sweep sees only the codebooks before the one it decides.
void spear_sweep(const float* costs, const float* cross, int32_t* codes, int64_t frames, int32_t num, int32_t size, int32_t sweeps, int32_t fresh) {
    const Shape shape{costs, cross, num, size};
    std::vector<float> given(size);
    std::vector<const float*> rows(num);
    std::vector<int32_t> chosen(1);
    Selector select;
    for (int64_t start = 0; start < frames; start += kChunkFrames)
        for (int sweep = 0; sweep < sweeps; ++sweep)
            for (int book = 0; book < num; ++book)
                for (int64_t frame = start; frame < std::min(frames, start + kChunkFrames); ++frame) {
                    int32_t* own = codes + frame * num;
                    given_costs(shape, frame, book, own, fresh && sweep == 0 ? book : num, rows.data(), given.data());
                    select(given.data(), size, 1, &own[book]);
                }
}

// Squared errors of codes, less the squared norms of the frames.
void spear_errors(const float* costs, const float* cross, const int32_t* codes, int64_t frames, int32_t num, int32_t size, float* errors) {
    const Shape shape{costs, cross, num, size};
    for (int64_t frame = 0; frame < frames; ++frame) errors[frame] = error_of(shape, frame, codes + frame * num);
}

}
