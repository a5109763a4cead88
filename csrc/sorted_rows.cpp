// Rows of a batch: sorted by the cluster of their target, and back; scaled; summed up by class. All on the calling
// thread: it takes microseconds, but a shared operation of PyTorch's, of which there would be several, waits on a busy
// machine for milliseconds each.
//
// The plain twins are in lastlayer/functional/groups.py, paths.py and sampled_logits.py.
#include <algorithm>
#include <cstring>
#include <vector>

#include "engine.h"
#include "products.h"

// The rows of a batch sorted by cluster, stably: `order (N,)`, and of every cluster that occurs its first sorted row,
// count, first weight row and size, in the first rows of `table (N, 4)`. Returns how many clusters occur. `totals (2,)`:
// the sums of their count * size and of their sizes.
LASTLAYER_KERNEL(group_by_cluster)
(const int64_t* clusters, const int64_t* offsets, int64_t num_rows, int64_t num_clusters, int64_t* order, int64_t* table,
 int64_t* totals) {
    std::vector<int64_t> begins(static_cast<size_t>(num_clusters + 1));
    for (int64_t n = 0; n < num_rows; ++n) ++begins[clusters[n] + 1];
    std::fill_n(totals, 2, 0);
    int64_t g = 0;
    for (int64_t c = 0; c < num_clusters; ++c) {
        const int64_t count = begins[c + 1];
        begins[c + 1] += begins[c];
        if (count == 0) continue;
        const int64_t group[] = {begins[c], count, offsets[c], offsets[c + 1] - offsets[c]};
        std::copy_n(group, 4, table + 4 * g++);
        totals[0] += count * group[3];
        totals[1] += group[3];
    }
    for (int64_t n = 0; n < num_rows; ++n) order[begins[clusters[n]]++] = n;
    return g;
}

// The weight rows of the groups, one group after the other.
LASTLAYER_KERNEL(touched_rows)(const int64_t* table, int64_t num_groups, int64_t* rows) {
    for (int64_t g = 0; g < num_groups; ++g)
        for (int64_t i = 0; i < table[4 * g + 3]; ++i) *rows++ = table[4 * g + 2] + i;
    return 0;
}

// Sorted rows: out[n] = rows[order[n]], `width` bytes each.
LASTLAYER_KERNEL(gather_rows)
(const void* rows, const int64_t* order, void* out, int64_t num_rows, int64_t width) {
    const auto* from = static_cast<const char*>(rows);
    auto* to = static_cast<char*>(out);
    for (int64_t n = 0; n < num_rows; ++n) std::memcpy(to + n * width, from + order[n] * width, static_cast<size_t>(width));
    return 0;
}

// And back, scaled: out[order[n]] = scale[n] * rows[n]; without an order each row stays where it is.
LASTLAYER_KERNEL(scaled_rows)
(const void* rows, const int64_t* order, const void* scale, void* out, int64_t num_rows, int64_t width, int64_t in_float64) {
    lastlayer::by_type(in_float64, [&](auto as) {
        for (int64_t n = 0; n < num_rows; ++n) {
            const int64_t place = order == nullptr ? n : order[n];
            lastlayer::set_1x1(as(out) + place * width, as(scale)[n], as(rows) + n * width, width);
        }
    });
    return 0;
}

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
