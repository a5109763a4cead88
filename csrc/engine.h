// What every source of the engine begins with.
//
// Each source is compiled once for every instruction set, into one shared library each, so the compiler's own macros
// (__AVX2__, __AVX512VNNI__, __ARM_FEATURE_DOTPROD, ...) tell a primitive which instructions it may use.
//
// A kernel takes addresses of contiguous arrays and numbers, and allocates nothing that outlives it:
//
//     LASTLAYER_KERNEL(name)(const float* values, int64_t count, ...) { ...; return 0; }
//
// It returns an int64; `Kernel("name", "pn...")` in lastlayer/kernels calls it.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define LASTLAYER_EXPORT __declspec(dllexport)
#else
#define LASTLAYER_EXPORT __attribute__((visibility("default")))
#endif
#define LASTLAYER_KERNEL(name) extern "C" LASTLAYER_EXPORT int64_t lastlayer_##name

namespace lastlayer {

// Addresses as arrays of one type.
template <class Number>
struct As {
    using Real = Number;
    const Real* operator()(const void* address) const { return static_cast<const Real*>(address); }
    Real* operator()(void* address) const { return static_cast<Real*>(address); }
};

// `run(as)`, where `as(address)` is an array of the type that a kernel's arrays hold.
template <class Run>
auto by_type(int64_t in_float64, const Run& run) {
    return in_float64 ? run(As<double>{}) : run(As<float>{});
}

}  // namespace lastlayer
