// Which instructions this processor has, and this process may use.
#include "engine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

// Places of the result's bits; `ISAS` in lastlayer/kernels/engine.py has the same.
[[maybe_unused]] constexpr int AVX2 = 0, AVX_VNNI = 1, AVX512 = 2, AVX512_VNNI = 3, AMX = 4, NEON_DOTPROD = 5, NEON_I8MM = 6;

[[maybe_unused]] int64_t flag(bool there, int place) { return static_cast<int64_t>(there) << place; }

#if defined(__x86_64__)

bool bit(unsigned value, int place) { return value >> place & 1; }

uint64_t states_kept_by_the_system() {  // XCR0
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

bool may_use_tiles() {  // Linux gives a process tiles when it requests them
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

int64_t features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const bool saves = bit(c, 27), fma = bit(c, 12), f16c = bit(c, 29);
    if (!saves) return 0;
    const uint64_t kept = states_kept_by_the_system();
    const bool ymm = (kept & 0x6) == 0x6, zmm = (kept & 0xe6) == 0xe6, tiles = (kept & 0x60000) == 0x60000;
    unsigned b7, c7, d7;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 0;
    unsigned a71 = 0, unused;
    if (a >= 1) __get_cpuid_count(7, 1, &a71, &unused, &unused, &unused);

    const bool avx2 = ymm && fma && f16c && bit(b7, 5);
    const bool avx512 = avx2 && zmm && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);  // F, DQ, BW, VL
    const bool avx512_vnni = avx512 && bit(c7, 11);
    const bool amx = avx512_vnni && tiles && bit(d7, 24) && bit(d7, 25) && may_use_tiles();
    return flag(avx2, AVX2) | flag(avx2 && bit(a71, 4), AVX_VNNI) | flag(avx512, AVX512) |
           flag(avx512_vnni, AVX512_VNNI) | flag(amx, AMX);
}

#elif defined(__aarch64__) && defined(__linux__)

int64_t features() {
    constexpr unsigned long ASIMDDP = 1ul << 20, I8MM = 1ul << 13;
    const bool dotprod = getauxval(AT_HWCAP) & ASIMDDP;
    return flag(dotprod, NEON_DOTPROD) | flag(dotprod && getauxval(AT_HWCAP2) & I8MM, NEON_I8MM);
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool has(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}

int64_t features() {
    const bool dotprod = has("hw.optional.arm.FEAT_DotProd");
    return flag(dotprod, NEON_DOTPROD) | flag(dotprod && has("hw.optional.arm.FEAT_I8MM"), NEON_I8MM);
}

#else

int64_t features() { return 0; }

#endif

}  // namespace

LASTLAYER_KERNEL(cpu_features)() { return features(); }
