// What Hopper's tensor cores can do: products of one block of shared memory, again and again, with nothing fetched and nothing looked at.
//
// Put before it: u32, u64, and `mma(int (&sums)[128], u64 rows, u64 centroids, int add)`, 64 rows × 256 centroids over 32 bytes.

constexpr int ROWS = 64 * 128;        // bytes of a warpgroup's rows: 64 of 128 bytes
constexpr int CENTROIDS = 256 * 128;  // and of the centroids, which both warpgroups of a block share

// The matrix descriptor of rows of 128 bytes, swizzled, in groups of 8 that lie 1,024 bytes apart (PTX ISA, "Matrix descriptor").
__device__ __forceinline__ u64 describe(u32 address) {
    return static_cast<u64>((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// 256 threads a block. out: int [blocks, 256], so that no product is left out; loops: of four products of each warpgroup.
extern "C" __global__ void __launch_bounds__(256, 1) ceiling(int* out, int loops) {
    extern __shared__ unsigned char dynamic[];
    const u32 base = (static_cast<u32>(__cvta_generic_to_shared(dynamic)) + 1023) & ~1023u;
    u32 random = threadIdx.x * 2654435761u + blockIdx.x * 40503u + 1;  // bits that change cost power, and power costs clock
    for (int i = 4 * threadIdx.x; i < 2 * ROWS + CENTROIDS; i += 4 * 256) {
        random ^= random << 13, random ^= random >> 17, random ^= random << 5;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(base + i), "r"(random));
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const u64 rows = describe(base + threadIdx.x / 128 * ROWS), centroids = describe(base + 2 * ROWS);
    int sums[128];
    for (int i = 0; i < 128; i++) sums[i] = 0;
    for (int loop = 0; loop < loops; loop++) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int part = 0; part < 4; part++) mma(sums, rows + 2 * part, centroids + 2 * part, 1);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    int total = 0;
    for (int i = 0; i < 128; i++) {
        asm volatile("" : "+r"(sums[i])::"memory");  // not read before the wait
        total += sums[i];
    }
    out[blockIdx.x * 256 + threadIdx.x] = total;
}
