// Rows of a batch summed up by class, on the calling thread: it takes microseconds, but a shared operation of PyTorch's
// waits on a busy machine for milliseconds.
//
// The plain twin is in lastlayer/functional/sampled_logits.py.
#include "engine.h"
#include "products.h"

// sums[places[n * count + c]] += factors[n * count + c] * rows[n], c < count; without factors, of 1.
LASTLAYER_KERNEL(add_rows)
(void* sums, const int64_t* places, const void* factors, const void* rows, int64_t num_rows, int64_t count, int64_t width,
 int64_t in_float64) {
    lastlayer::by_type(in_float64, [&](auto as) {
        for (int64_t k = 0; k < num_rows * count; ++k) {
            const auto factor = factors == nullptr ? 1 : as(factors)[k];
            lastlayer::add_1x1(as(sums) + places[k] * width, factor, as(rows) + k / count * width, width);
        }
    });
    return 0;
}
