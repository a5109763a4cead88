#include "parallel.h"

#include <time.h>

#include "engine.h"

namespace {

// PyTorch's stable C interface: torch/csrc/stable/c/shim.h. `lastlayer.kernels.engine` finds the functions and passes
// their addresses over, so that no header of PyTorch is needed to build.
using Range = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Range function, void* context);
using NumThreads = int32_t (*)(uint32_t* number);

ParallelFor torch_parallel_for = nullptr;
NumThreads torch_num_threads = nullptr;

struct Task {
    void (*task)(void*);
    void* context;
};

void run_once_or_more(int64_t, int64_t, void* context) {
    // However PyTorch divides the workers, each call takes chunks until none is left.
    const auto& task = *static_cast<Task*>(context);
    task.task(task.context);
}

constexpr std::chrono::microseconds LEAST_LOSS{100};  // that says anything: waking a thread takes some 50
constexpr int ALONE_FOR = 30;                         // times what was lost
constexpr std::chrono::seconds MOST_ALONE{1};

std::atomic<std::chrono::steady_clock::rep> alone_until{0};

}  // namespace

namespace lastlayer {

int64_t processor_time() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
    timespec time;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
#endif
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void Watch::region_done() const {
    const Clock::time_point now = Clock::now();
    const Clock::duration lost = now - began - std::chrono::nanoseconds(needed.load(std::memory_order_relaxed));
    if (lost < LEAST_LOSS) return;
    const Clock::duration alone = std::min<Clock::duration>(ALONE_FOR * lost, MOST_ALONE);
    alone_until.store((now + alone).time_since_epoch().count(), std::memory_order_relaxed);
}

bool better_alone() {
    const auto until = alone_until.load(std::memory_order_relaxed);
    return until != 0 && std::chrono::steady_clock::now().time_since_epoch().count() < until;
}

int64_t num_threads() {
    uint32_t number = 1;
    if (torch_parallel_for == nullptr || torch_num_threads(&number) != 0) return 1;
    return number;
}

void run_on_threads(int64_t workers, void (*task)(void*), void* context) {
    Task both{task, context};
    if (torch_parallel_for(0, workers, 1, run_once_or_more, &both) != 0) task(context);
}

}  // namespace lastlayer

// Null addresses: everything runs on the calling thread (as after a fork, which PyTorch's threads do not survive).
LASTLAYER_KERNEL(use_threads)(void* parallel_for, void* number) {
    torch_parallel_for = reinterpret_cast<ParallelFor>(number == nullptr ? nullptr : parallel_for);
    torch_num_threads = reinterpret_cast<NumThreads>(number);
    return 0;
}
