// Memory fetched before it is needed, and written past the caches, for matrices that are larger than these.
//
// A processor's own prefetcher stops at every page, and an ordinary store first reads the line that it changes.
#pragma once

#include <cstring>

#include "engine.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace lastlayer {

constexpr int64_t CACHE_BYTES = 1 << 23;  // what may be in a cache still when it is read again
constexpr int64_t LINE_BYTES = 64;
constexpr int64_t PREFETCH_BYTES = 8192;  // how far ahead
constexpr int64_t STREAM_BYTES = 16;      // `stream` writes multiples of it, to addresses that are multiples of it

// Fetches `bytes` into the second-level cache without waiting; an address of nothing does no harm.
inline void prefetch(const void* begin, int64_t bytes) {
    const auto* at = static_cast<const char*>(begin);
    for (int64_t k = 0; k < bytes; k += LINE_BYTES) __builtin_prefetch(at + k, 0, 2);
}

// Copies past the caches; `stream_fence` ends it, before another thread reads what was written.
#if defined(__SSE2__)
inline void stream(void* to, const void* from, int64_t bytes) {
    const auto* source = static_cast<const __m128i*>(from);
    auto* target = static_cast<__m128i*>(to);
    for (int64_t k = 0; k < bytes / STREAM_BYTES; ++k) _mm_stream_si128(target + k, _mm_loadu_si128(source + k));
}
inline void stream_fence() { _mm_sfence(); }
#else
inline void stream(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }
inline void stream_fence() {}
#endif

// Whether rows of so many bytes from `begin` on may be written by `stream`, and should.
inline bool better_streamed(const void* begin, int64_t num_rows, int64_t row_bytes) {
    const bool aligned = reinterpret_cast<uintptr_t>(begin) % STREAM_BYTES == 0 && row_bytes % STREAM_BYTES == 0;
    return aligned && num_rows * row_bytes >= CACHE_BYTES;
}

}  // namespace lastlayer
