// What the products of a decoding step share, from Ampere to Hopper: waits for other kernels, asynchronous copies, a
// product on tensor cores, and pieces of 8 numbers; placed before their kernels.
//
// Defined before this file: `values_sm80.cuh`; HOPPER (with programmatic dependent launch and bulk copies).

__device__ __forceinline__ void wait_for_previous() {
    if (HOPPER) asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void start_next() {
    if (HOPPER) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Copies 16 bytes to shared memory.
__device__ __forceinline__ void copy_piece(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :: "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}

__device__ __forceinline__ void multiply(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (BFLOAT)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void widen8(const uint4& given, float (&x)[8]) {
    const u32 pairs[4] = {given.x, given.y, given.z, given.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 two = widen(pairs[j]);
        x[2 * j] = two.x, x[2 * j + 1] = two.y;
    }
}
__device__ __forceinline__ uint4 narrow8(const float (&x)[8]) {
    u32 pairs[4];
#pragma unroll
    for (int j = 0; j < 4; j++) pairs[j] = half_of(x[2 * j]) | half_of(x[2 * j + 1]) << 16;
    return uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
}
