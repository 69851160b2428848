// Nearest centroids on b1 tensor cores (Ampere, Ada): AND-POPC `mma` on packed bits, arg-max in registers.
//
// A block of 8 warps takes 128 rows. It loops over 256 clusters and 128 bytes of a row at a time, through a
// ring of STAGES in shared memory; each warp multiplies 64 rows × 64 clusters. Rows in shared memory are
// padded by 16 bytes, so that the 8 × 4 words of a fragment fall into 32 different banks.
//
// Defined before this file: STAGES. Rows must start on 16 bytes.

constexpr int ROWS = 128, TILE_K = 256, STEP = 128, PITCH = STEP + 16;
constexpr int STAGE = (ROWS + TILE_K) * PITCH;
constexpr int COLUMNS = 16;  // scores per row in one thread's registers

__device__ __forceinline__ void copy(unsigned char* to, const unsigned char* from, bool there) {
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void mma(int (&sums)[4], const u32 (&rows)[4], const u32 (&centroids)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(centroids[0]), "r"(centroids[1]));
}

extern "C" __global__ void __launch_bounds__(256, 1)
assign(const unsigned char* __restrict__ rows,       // uint8 [G, N, W], strides row_group_stride, row_stride, 1
       const unsigned char* __restrict__ centroids,  // uint8 [G, K, W]
       long long* __restrict__ ids,                  // [G, N], out
       int* __restrict__ scores,                     // [G, N], out, or null
       long long row_group_stride, long long row_stride, int N, int K, int W) {
    extern __shared__ __align__(16) unsigned char ring[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 64;
    const long long first_row = static_cast<long long>(blockIdx.x) * ROWS;
    const unsigned char* my_rows = rows + blockIdx.y * row_group_stride;
    const unsigned char* my_centroids = centroids + static_cast<long long>(blockIdx.y) * K * W;
    const int steps = (W + STEP - 1) / STEP, k_tiles = (K + TILE_K - 1) / TILE_K;
    const int turns = steps * k_tiles;

    auto fill = [&](int turn) {
        unsigned char* stage = ring + turn % STAGES * STAGE;
        const int byte = turn % steps * STEP + threadIdx.x % 8 * 16, k_first = turn / steps * TILE_K;
#pragma unroll
        for (int i = 0; i < (ROWS + TILE_K) / 32; i++) {
            const int line = threadIdx.x / 8 + i * 32;
            const bool is_row = i < ROWS / 32;
            const long long index = is_row ? first_row + line : k_first + line - ROWS;
            const bool there = byte < W && index < (is_row ? N : K);
            const unsigned char* from = is_row ? my_rows + index * row_stride : my_centroids + index * W;
            copy(stage + line * PITCH + threadIdx.x % 8 * 16, there ? from + byte : my_centroids, there);
        }
    };

    int sums[4][8][4], best[8], best_tile[8];
#pragma unroll
    for (int i = 0; i < 8; i++) best[i] = -1, best_tile[i] = 0;
    for (int turn = 0; turn < STAGES - 1; turn++) {
        if (turn < turns) fill(turn);
        asm volatile("cp.async.commit_group;");
    }
    for (int turn = 0; turn < turns; turn++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();
        if (turn + STAGES - 1 < turns) fill(turn + STAGES - 1);
        asm volatile("cp.async.commit_group;");
        const unsigned char* stage = ring + turn % STAGES * STAGE;
        if (turn % steps == 0) {
#pragma unroll
            for (int i = 0; i < 128; i++) sums[i / 32][i / 4 % 8][i % 4] = 0;
        }
#pragma unroll
        for (int part = 0; part < STEP / 32; part++) {
            u32 a[4][4], b[8][2];
#pragma unroll
            for (int m = 0; m < 4; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    a[m][i] = *reinterpret_cast<const u32*>(stage + (warp_row + m * 16 + lane / 4 + i % 2 * 8) * PITCH + part * 32 + i / 2 * 16 + lane % 4 * 4);
            }
#pragma unroll
            for (int n = 0; n < 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++)
                    b[n][i] = *reinterpret_cast<const u32*>(stage + (ROWS + warp_column + n * 8 + lane / 4) * PITCH + part * 32 + i * 16 + lane % 4 * 4);
            }
#pragma unroll
            for (int m = 0; m < 4; m++) {
#pragma unroll
                for (int n = 0; n < 8; n++) mma(sums[m][n], a[m], b[n]);
            }
        }
        if (turn % steps == steps - 1) {
#pragma unroll
            for (int i = 0; i < 8; i++) {  // the warp's row 16 · (i / 2) + 8 · (i % 2) + lane / 4
                int top = -1;
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) top = max(top, sums[i / 2][j / 2][i % 2 * 2 + j % 2] * COLUMNS + (COLUMNS - 1 - j));
                if ((top | (COLUMNS - 1)) > (best[i] | (COLUMNS - 1))) best[i] = top, best_tile[i] = turn / steps;
            }
        }
    }

    __syncthreads();
    u64* keys = reinterpret_cast<u64*>(ring);  // [ROWS, 4], the best key among each warp's columns
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int column = COLUMNS - 1 - best[i] % COLUMNS;
        const u32 id = best_tile[i] * TILE_K + warp_column + column / 2 * 8 + lane % 4 * 2 + column % 2;
        u64 key = static_cast<u64>(best[i] / COLUMNS) << 32 | static_cast<u32>(~id);
        key = max(key, __shfl_xor_sync(~0u, key, 1));
        key = max(key, __shfl_xor_sync(~0u, key, 2));
        if (lane % 4 == 0) keys[(warp_row + i / 2 * 16 + i % 2 * 8 + lane / 4) * 4 + warp % 4] = key;
    }
    __syncthreads();
    if (threadIdx.x < ROWS && first_row + threadIdx.x < N) {
        const u64* mine = keys + threadIdx.x * 4;
        const u64 key = max(max(mine[0], mine[1]), max(mine[2], mine[3]));
        const long long to = static_cast<long long>(blockIdx.y) * N + first_row + threadIdx.x;
        ids[to] = static_cast<u32>(~static_cast<u32>(key));
        if (scores) scores[to] = static_cast<int>(key >> 32);
    }
}
