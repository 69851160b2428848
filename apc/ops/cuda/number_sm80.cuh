// A number of a float tensor; placed before the kernels that read one.
//
// Defined before this file: HIDDEN, its type, an index of `nvrtc.INPUT_TYPES` (0 bfloat16, 1 float16, 2 float32).

__device__ __forceinline__ float number(const void* given, long long at) {
    if (HIDDEN == 2) return static_cast<const float*>(given)[at];
    const unsigned short half = static_cast<const unsigned short*>(given)[at];
    if (HIDDEN == 0) return __uint_as_float(static_cast<u32>(half) << 16);
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(half));
    return result;
}

