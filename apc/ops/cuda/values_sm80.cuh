// Numbers of 16 bits, activations and sums of a warp, placed before the kernels that read them.
//
// Defined before this file: BFLOAT (else float16); ACTIVATION (0 silu, 1 gelu, 2 gelu_tanh, 3 relu).

// The two numbers of a word as floats, the lower half first.
__device__ __forceinline__ float2 widen(u32 pair) {
    float2 result;
    if (BFLOAT) {
        result.x = __uint_as_float(pair << 16);
        result.y = __uint_as_float(pair & 0xFFFF0000u);
    } else {
        asm("{ .reg .f16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high; }"
            : "=f"(result.x), "=f"(result.y) : "r"(pair));
    }
    return result;
}

// A float as a number of 16 bits, and the float that this is: models round so between operations.
__device__ __forceinline__ unsigned short half_of(float x) {
    unsigned short half;
    if (BFLOAT)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(x));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
__device__ __forceinline__ float round_half(float x) { return widen(half_of(x)).x; }

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

__device__ __forceinline__ float activate(float x) {
    if (ACTIVATION == 1) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    if (ACTIVATION == 3) return x < 0.0f ? 0.0f : x;  // NaN stays
    const float y = ACTIVATION == 0 ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);  // ½ (1 + tanh y) = σ(2 y)
    return x / (1.0f + expf(-y));
}

