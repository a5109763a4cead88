// Loops shared among PyTorch's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lastlayer {

// The number of threads that `parallel_for` may use; 1 where PyTorch's are not to be had.
int64_t num_threads();

// Calls `task(context)` on `workers` of PyTorch's threads (on fewer inside another parallel region) and waits.
void run_on_threads(int64_t workers, void (*task)(void* context), void* context);

// `body(begin, end)` over all of [0, count), in chunks of `grain`, which threads take as they become free: one that
// is delayed takes fewer. Work of a single chunk stays on the calling thread. `body` must not throw.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
    const int64_t chunks = (count + grain - 1) / grain;
    const int64_t workers = std::min(num_threads(), chunks);
    if (workers <= 1) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    struct Shared {
        const Body& body;
        int64_t count, grain;
        std::atomic<int64_t> next;
    } shared{body, count, grain, {0}};
    const auto task = [](void* context) {
        auto& work = *static_cast<Shared*>(context);
        for (;;) {
            const int64_t begin = work.next.fetch_add(work.grain, std::memory_order_relaxed);
            if (begin >= work.count) return;
            work.body(begin, std::min(begin + work.grain, work.count));
        }
    };
    run_on_threads(workers, task, &shared);
}

}  // namespace lastlayer
