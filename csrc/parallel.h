// Loops shared among PyTorch's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace lastlayer {

// The number of threads that `parallel_for` may use; 1 where PyTorch's are not to be had.
int64_t num_threads();

// Calls `task(context)` on `workers` of PyTorch's threads (on fewer inside another parallel region) and waits.
void run_on_threads(int64_t workers, void (*task)(void* context), void* context);

// Nanoseconds that the calling thread has had a processor for.
int64_t processor_time();

// Whether sharing a loop paid: its duration against the processor time that its threads needed for it.
class Watch {
   public:
    Watch() : began(Clock::now()), needed(0) {}

    // Of every thread, after its last chunk.
    void add(int64_t nanoseconds) { needed.fetch_add(nanoseconds, std::memory_order_relaxed); }

    // After the region. Where it took much longer than one thread alone would have, some thread did not get its
    // processor: parallel regions would go on to wait for it, so that for a while there are none.
    void region_done() const;

   private:
    using Clock = std::chrono::steady_clock;
    Clock::time_point began;
    std::atomic<int64_t> needed;
};

// Whether sharing cost time lately, as the machine is busy.
bool better_alone();

// `body(begin, end)` over all of [0, count), in chunks of `grain`, which threads take as they become free: one that
// is delayed takes fewer. Work of a single chunk stays on the calling thread, as does all work while the machine is
// busy with something else. `body` must not throw.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
    const int64_t chunks = (count + grain - 1) / grain;
    const int64_t workers = std::min(num_threads(), chunks);
    if (workers <= 1 || better_alone()) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    struct Shared {
        const Body& body;
        int64_t count, grain;
        std::atomic<int64_t> next;
        Watch watch;
    } shared{body, count, grain, {0}, {}};
    const auto task = [](void* context) {
        auto& work = *static_cast<Shared*>(context);
        const int64_t before = processor_time();
        for (;;) {
            const int64_t begin = work.next.fetch_add(work.grain, std::memory_order_relaxed);
            if (begin >= work.count) break;
            work.body(begin, std::min(begin + work.grain, work.count));
        }
        work.watch.add(processor_time() - before);
    };
    run_on_threads(workers, task, &shared);
    shared.watch.region_done();
}

}  // namespace lastlayer
