#include "parallel.h"

#include "engine.h"

namespace {

// PyTorch's stable C interface: torch/csrc/stable/c/shim.h. `lastlayer.kernels.engine` finds the functions and hands
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

}  // namespace

namespace lastlayer {

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
