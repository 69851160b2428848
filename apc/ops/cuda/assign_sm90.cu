// Nearest centroids on Hopper's tensor cores: scores row · centroid by asynchronous warpgroup products
// (wgmma), arg-max in registers.
//
// The `mma` defined before this file selects one of two products: AND-POPC of packed bits (`b1`), where a
// step of 32 bytes is 256 neurons, or uint8 × uint8 (importance × the centroids' bits as bytes), where it is
// 32 neurons. Rows and centroids have W bytes in both cases. With two PASSES a row is two rows of bytes: its
// high bytes in group g, its low bytes in group G + g. The sums over the high bytes are multiplied by 256
// before the low bytes are added.
//
// A block has one producer warp, which fills a ring of stages by TMA, and CONSUMERS warpgroups of 64 rows each. The two
// blocks of a cluster share their centroids: each fetches half of a tile for both.
//
// Defined before this file: CONSUMERS; TILE_K, clusters at a time; STAGES; CLUSTER, blocks of a cluster;
// TAIL, products of 32 bytes in a row's last step; PASSES; and `mma(int (&sums)[TILE_K / 2], u64 rows, u64
// centroids, int add)`.

constexpr int STEP = 128;                // bytes of a row in a stage: the width of the 128-byte swizzle
constexpr int ROWS = 64 * CONSUMERS;     // rows of a block
constexpr int COLUMNS = TILE_K / 4;      // scores per row in one thread's registers; a thread has two rows
constexpr int ROW_STAGE = ROWS * STEP;
constexpr int CENTROID_STAGE = TILE_K * STEP;
constexpr int SHARE = TILE_K / CLUSTER;  // centroids of a tile that each block fetches

template <int N>
struct Parts {
    static constexpr int count = N;
};

struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

// Arrives at the barrier of block `block` of the cluster, at the same address as `barrier` in this block. The
// products that read the released stage have completed, so no cluster-wide memory order is needed;
// `.release.cluster` here would cost 900 clocks per stage.
__device__ __forceinline__ void arrive_at(u64* barrier, int block) {
    asm volatile(
        "{ .reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(barrier)), "r"(block) : "memory");
}

__device__ __forceinline__ void fetch(u32 to, const TensorMap& map, u64* barrier, int byte, int row, int group) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(&map), "r"(byte), "r"(row), "r"(group), "r"(shared_address(barrier))
        : "memory");
}

__device__ __forceinline__ void fetch_for_cluster(u32 to, const TensorMap& map, u64* barrier, int byte, int row, int group) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
        "l"(&map), "r"(byte), "r"(row), "r"(group), "r"(shared_address(barrier)), "h"(static_cast<unsigned short>((1 << CLUSTER) - 1))
        : "memory");
}

// The matrix descriptor of a stage: swizzled rows of 128 bytes, in groups of 8 rows that are 1,024 bytes
// apart (PTX ISA, "Matrix descriptor").
__device__ __forceinline__ u64 describe(u32 address) {
    return static_cast<u64>((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The work item of a cluster of blocks: a row tile, and the tiles of clusters k_first … k_last-1. Row tiles
// from `whole` on are cut along K into `splits` items; the results of these items meet in row `slot` of
// `keys` (-1: the tile is not cut).
struct Item {
    int group, first_row, k_first, k_last, slot;
};

__device__ __forceinline__ Item item_of(int index, int whole, int splits, int tiles_in_group, int k_tiles, int block) {
    int tile = index, part = 0, parts = 1, slot = -1;
    if (index >= whole) {
        slot = (index - whole) / splits;
        part = (index - whole) % splits;
        parts = splits;
        tile = whole + slot;
    }
    Item item;
    item.group = tile / tiles_in_group;
    item.first_row = ((tile % tiles_in_group) * CLUSTER + block) * ROWS;
    item.k_first = static_cast<int>(static_cast<long long>(part) * k_tiles / parts);
    item.k_last = static_cast<int>(static_cast<long long>(part + 1) * k_tiles / parts);
    item.slot = slot;
    return item;
}

extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1) __cluster_dims__(CLUSTER, 1, 1)
assign(const __grid_constant__ TensorMap rows,       // uint8 [PASSES * G, N, W]
       const __grid_constant__ TensorMap centroids,  // uint8 [G, K, W]
       long long* __restrict__ ids,                  // [G, N], out
       int* __restrict__ scores,                     // [G, N], out, or null
       u64* __restrict__ keys,                       // [cut tiles, CLUSTER * ROWS], initially zero: score << 32 | ~id
       int N, int G, int steps, int k_tiles, int tiles_in_group, int items, int whole, int splits) {
    extern __shared__ unsigned char dynamic[];
    __shared__ u64 full[STAGES], empty[STAGES];
    const u32 ring = (shared_address(dynamic) + 1023) & ~1023u;
    const u32 centroid_ring = ring + STAGES * ROW_STAGE;
    const int block = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0;
    const int first_item = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
    const int warpgroup = threadIdx.x / 128;

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(&full[stage], 1);
            barrier_init(&empty[stage], CONSUMERS * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();

    if (warpgroup == 0) {
        if (threadIdx.x == 0) {
            int stage = 0;
            u32 parity = 1;  // the first round finds its stages free
            for (int index = first_item; index < items; index += stride) {
                const Item item = item_of(index, whole, splits, tiles_in_group, k_tiles, block);
                for (int k = item.k_first; k < item.k_last; k++) {
                    for (int pass = 0; pass < PASSES; pass++) {
                        for (int step = 0; step < steps; step++) {
                            barrier_wait(&empty[stage], parity);
                            expect_bytes(&full[stage], ROW_STAGE + CENTROID_STAGE);
                            fetch(ring + stage * ROW_STAGE, rows, &full[stage], step * STEP, item.first_row, pass * G + item.group);
                            const u32 to = centroid_ring + stage * CENTROID_STAGE + block * SHARE * STEP;
                            if (CLUSTER > 1)
                                fetch_for_cluster(to, centroids, &full[stage], step * STEP, k * TILE_K + block * SHARE, item.group);
                            else
                                fetch(to, centroids, &full[stage], step * STEP, k * TILE_K, item.group);
                            if (++stage == STAGES) stage = 0, parity ^= 1;
                        }
                    }
                }
            }
        }
    } else {
        const int consumer = warpgroup - 1;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        int stage = 0, sums[TILE_K / 2];
        u32 parity = 0;
        const bool signals = threadIdx.x % 128 < CLUSTER;

        // Starts the products of the current stage, `parts` times 32 bytes.
        auto multiply = [&](auto parts, int add) {
            barrier_wait(&full[stage], parity);
            const u64 a = describe(ring + stage * ROW_STAGE + consumer * 64 * STEP);
            const u64 b = describe(centroid_ring + stage * CENTROID_STAGE);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            mma(sums, a, b, add);
#pragma unroll
            for (int part = 1; part < decltype(parts)::count; part++) mma(sums, a + 2 * part, b + 2 * part, 1);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        };

        for (int index = first_item; index < items; index += stride) {
            const Item item = item_of(index, whole, splits, tiles_in_group, k_tiles, block);
            int best[2] = {-1, -1}, best_id[2] = {0, 0};
            for (int k = item.k_first; k < item.k_last; k++) {
#pragma unroll
                for (int pass = 0; pass < PASSES; pass++) {
                    int previous = stage;
                    for (int step = 0; step < steps - 1; step++) {
                        multiply(Parts<STEP / 32>(), pass + step > 0);
                        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                        if (signals && step > 0) arrive_at(&empty[previous], threadIdx.x % 128);
                        previous = stage;
                        if (++stage == STAGES) stage = 0, parity ^= 1;
                    }
                    multiply(Parts<TAIL>(), pass + steps > 1);
                    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
                    for (int i = 0; i < TILE_K / 2; i++) asm volatile("" : "+r"(sums[i])::"memory");
                    if (signals) {
                        if (steps > 1) arrive_at(&empty[previous], threadIdx.x % 128);
                        arrive_at(&empty[stage], threadIdx.x % 128);
                    }
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                    if (pass + 1 < PASSES) {
#pragma unroll
                        for (int i = 0; i < TILE_K / 2; i++) sums[i] *= 256;
                    }
                }
                // A thread's scores: rows lane / 4 and lane / 4 + 8, columns 8 · (j / 2) + 2 · (lane % 4) + j % 2.
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int score = -1, column = 0;
                    if (PASSES == 1) {  // keys order by score, then by the lower column; one max instruction takes two
                        int top = -1;
#pragma unroll
                        for (int j = 0; j < COLUMNS; j++) top = max(top, sums[j / 2 * 4 + 2 * half + j % 2] * COLUMNS + (COLUMNS - 1 - j));
                        score = top / COLUMNS, column = COLUMNS - 1 - top % COLUMNS;
                    } else {  // scores too large for a key
#pragma unroll
                        for (int j = 0; j < COLUMNS; j++)
                            if (sums[j / 2 * 4 + 2 * half + j % 2] > score) score = sums[j / 2 * 4 + 2 * half + j % 2], column = j;
                    }
                    if (score > best[half]) {  // strictly greater: on a tie the earlier tile's ids are lower
                        best[half] = score;
                        best_id[half] = k * TILE_K + column / 2 * 8 + lane % 4 * 2 + column % 2;
                    }
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int score = best[half], id = best_id[half];
#pragma unroll
                for (int distance = 1; distance < 4; distance *= 2) {
                    const int other_score = __shfl_xor_sync(~0u, score, distance), other_id = __shfl_xor_sync(~0u, id, distance);
                    if (other_score > score || (other_score == score && other_id < id)) score = other_score, id = other_id;
                }
                // Clusters past K have score 0 and the highest ids, so they never win.
                const int row_in_block = consumer * 64 + warp * 16 + lane / 4 + half * 8, row = item.first_row + row_in_block;
                if (lane % 4 == 0 && row < N) {
                    if (item.slot < 0) {
                        ids[static_cast<long long>(item.group) * N + row] = id;
                        if (scores) scores[static_cast<long long>(item.group) * N + row] = score;
                    } else {
                        const long long slot = (static_cast<long long>(item.slot) * CLUSTER + block) * ROWS + row_in_block;
                        atomicMax(keys + slot, static_cast<u64>(score) << 32 | static_cast<u32>(~id));
                    }
                }
            }
        }
    }
    if (CLUSTER > 1) cluster_sync();  // no block exits while the other may still arrive at its barriers
}

// Writes the ids and scores of the row tiles that were cut along K, from their keys.
extern "C" __global__ void take_keys(const u64* __restrict__ keys,   // [cut tiles, CLUSTER * ROWS]
                                     long long* __restrict__ ids,    // [G, N], out
                                     int* __restrict__ scores,       // [G, N], out, or null
                                     int N, int first_tile, int tiles_in_group) {
    const int row_of_tile = threadIdx.x;
    const int tile = first_tile + blockIdx.x;
    const int row = tile % tiles_in_group * CLUSTER * ROWS + row_of_tile;
    if (row < N) {
        const u64 key = keys[static_cast<long long>(blockIdx.x) * CLUSTER * ROWS + row_of_tile];
        const long long to = static_cast<long long>(tile / tiles_in_group) * N + row;
        ids[to] = ~static_cast<u32>(key);
        if (scores) scores[to] = static_cast<int>(key >> 32);
    }
}
