// A gated FFN over the neurons that masks keep, on Hopper. There is one block per multiprocessor. Bulk copies fetch the
// rows of its share of the neurons into a ring in shared memory, while eight warps multiply the stages that
// have arrived.
//
// A stage is ROWS neurons: their rows of gate, up and down (transposed). Each warp computes part of the
// product of one row and the input. Then every thread knows the neurons' values, and adds their rows of down
// to its own columns of the output. Sums are float32 and their order is fixed.
//
// The kernel also computes the bottleneck that predicts a later layer's clusters. Its rows come first in the
// ring, 2 · ROWS in a stage. They need no mask, so memory is busy while the block finds its neurons.
//
// Defined before this file: N tokens (a power of two); E; ROWS; STAGES; MOST, the most neurons of a block;
// WORDS of a mask; CANDIDATES (0: a mask per token); ACTIVATION (0 silu, 1 gelu, 2 gelu_tanh, 3 relu); BFLOAT
// (else float16); LATER, rows of the later bottleneck (0: none); FOUND (1: `find` listed the neurons before
// the previous kernel began, so this kernel fetches their rows while the previous kernel runs).

constexpr int WARPS = 8, CONSUMERS = 32 * WARPS, THREADS = CONSUMERS + 32;
constexpr int CHUNKS = E / 8;  // chunks of 16 bytes of a row
constexpr int OWN = (CHUNKS + CONSUMERS - 1) / CONSUMERS;  // chunks whose sums a thread keeps
constexpr int PARTS = WARPS / (2 * ROWS);  // warps per product
constexpr int EACH = (CHUNKS + 32 * PARTS - 1) / (32 * PARTS);  // chunks of a row that a thread multiplies
constexpr int KEPT = N == 1 && EACH <= 16 ? EACH : 0;           // chunks of the input in a thread's registers
constexpr int ROW_BYTES = 2 * E, STAGE_BYTES = 3 * ROWS * ROW_BYTES;
constexpr int PRODUCTS = 2 * ROWS;  // products at a time
static_assert(PARTS * PRODUCTS == WARPS && E % 8 == 0, "warps are dealt out to products evenly, rows are copied in pieces of 16 bytes");

// Writes the neurons of each block of `rows` to listed, [blocks, 1 + MOST]: how many, then which.
extern "C" __global__ void __launch_bounds__(THREADS, 1) find(const u32* masks, const float* values, const int* ids, int* listed, int tokens) {
    __shared__ u32 list[MOST];
    __shared__ int mask_of[N];
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int neurons = find_neurons<THREADS>(masks, values, ids, tokens, mask_of, list);
    int* const own = listed + blockIdx.x * (1 + MOST);
    if (threadIdx.x == 0) own[0] = neurons;
    for (int i = threadIdx.x; i < neurons; i += THREADS) own[1 + i] = list[i];
    __threadfence();  // `rows` reads it before it waits, and may begin as soon as this kernel ends
}

// The FFN. Pointers that earlier kernels write to are not `__restrict__`, since the compiler must not move
// their reads before the wait.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
rows(const uint4* hidden,                      // [tokens, E]
     const unsigned char* __restrict__ gate,   // [D, E], rows `gate_bytes` apart
     const unsigned char* __restrict__ up,     // [D, E], rows `up_bytes` apart
     const unsigned char* __restrict__ down,   // [D, E], transposed, rows `down_bytes` apart
     const u32* masks,                         // [K or tokens, WORDS]
     const float* values,                      // [tokens, CANDIDATES]
     const int* ids,                           // [tokens, CANDIDATES]
     const int* listed,                        // as `find` writes it, read if FOUND
     float4* partial,                          // [blocks, tokens, E], out
     int tokens, long long gate_bytes, long long up_bytes, long long down_bytes,
     const unsigned char* __restrict__ later,  // [LATER, E], contiguous
     const float* __restrict__ later_bias,     // [LATER]
     float* later_inner,                       // [tokens, LATER], out: SiLU(rms_norm(hidden) · laterᵀ + bias)
     float epsilon) {
    extern __shared__ __align__(128) unsigned char ring[];
    uint4* const given = reinterpret_cast<uint4*>(ring + STAGES * STAGE_BYTES);  // [N, CHUNKS], the input
    // [MOST], neuron | tokens that keep it << 24
    u32* const list = reinterpret_cast<u32*>(given + N * CHUNKS);
    __shared__ u64 full[STAGES], empty[STAGES], arrived;
    __shared__ int mask_of[N];
    __shared__ float products[2][ROWS][2][PARTS][N];
    __shared__ float squares[WARPS][N];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int later_first = static_cast<int>(blockIdx.x * static_cast<u32>(LATER) / gridDim.x);
    const int later_rows = static_cast<int>((blockIdx.x + 1) * static_cast<u32>(LATER) / gridDim.x) - later_first;
    const int later_stages = (later_rows + PRODUCTS - 1) / PRODUCTS;

    // Fetches rows of the later bottleneck into their stage of the ring, which must be free.
    auto fetch_later = [&](int index) {
        const int stage = index % STAGES, rows = min(PRODUCTS, later_rows - index * PRODUCTS);
        expect_bytes(&full[stage], rows * ROW_BYTES);
        for (int row = 0; row < rows; row++)
            fetch(shared_address(ring) + stage * STAGE_BYTES + (3 * (row / 2) + row % 2) * ROW_BYTES,
                  later + static_cast<long long>(later_first + index * PRODUCTS + row) * ROW_BYTES, ROW_BYTES, &full[stage]);
    };
    auto fetch_hidden = [&] {
        expect_bytes(&arrived, tokens * ROW_BYTES);
        for (int n = 0; n < tokens; n++) fetch(shared_address(given + n * CHUNKS), hidden + n * CHUNKS, ROW_BYTES, &arrived);
    };

    if (thread == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(&full[stage], 1);
            barrier_init(&empty[stage], WARPS);
        }
        barrier_init(&arrived, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        // This thread uses the barriers in bulk copies right away.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        for (int index = 0; index < min(later_stages, STAGES); index++) fetch_later(index);
    }
    if (!FOUND) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        if (thread == 0) fetch_hidden();  // the input arrives while the block finds its neurons
    }
    for (int i = tokens * CHUNKS + thread; i < N * CHUNKS; i += THREADS) given[i] = uint4{0, 0, 0, 0};
    int neurons;
    if (FOUND) {
        const int* const own = listed + blockIdx.x * (1 + MOST);
        neurons = __ldcg(own);
        for (int i = thread; i < neurons; i += THREADS) list[i] = __ldcg(own + 1 + i);
        __syncthreads();
    } else {
        neurons = find_neurons<THREADS>(masks, values, ids, tokens, mask_of, list);
    }
    const int stages = (neurons + ROWS - 1) / ROWS;

    if (warp == WARPS) {
        if (lane == 0) {
            for (int place = min(later_stages, STAGES); place < later_stages + stages; place++) {
                const int stage = place % STAGES, index = place - later_stages, rows = min(ROWS, neurons - index * ROWS);
                barrier_wait(&empty[stage], (place / STAGES + 1) & 1);  // the first round finds its stages free
                if (index < 0) {
                    fetch_later(place);
                    continue;
                }
                expect_bytes(&full[stage], 3 * rows * ROW_BYTES);
                const u32 to = shared_address(ring) + stage * STAGE_BYTES;
                for (int row = 0; row < rows; row++) {
                    const long long neuron = list[index * ROWS + row] & 0xFFFFFF;
                    fetch(to + 3 * row * ROW_BYTES, gate + neuron * gate_bytes, ROW_BYTES, &full[stage]);
                    fetch(to + (3 * row + 1) * ROW_BYTES, up + neuron * up_bytes, ROW_BYTES, &full[stage]);
                    fetch(to + (3 * row + 2) * ROW_BYTES, down + neuron * down_bytes, ROW_BYTES, &full[stage]);
                }
            }
        }
        return;
    }

    if (FOUND) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        if (thread == 0) fetch_hidden();
    }
    barrier_wait(&arrived, 0);
    float sums[N][OWN][8] = {};
    const int product = warp / PARTS, part = warp % PARTS, product_row = product / 2, which = product % 2;
    uint4 mine[KEPT > 0 ? KEPT : 1];  // the chunks of the input that this thread multiplies, if it keeps them
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        const int chunk = part * 32 + lane + j * 32 * PARTS;
        mine[j] = chunk < CHUNKS ? given[chunk] : uint4{0, 0, 0, 0};
    }
    // Writes this warp's part of the product of its row in a stage and each token's input to `products`.
    auto multiply = [&](const unsigned char* held, int buffer) {
        const uint4* const row = reinterpret_cast<const uint4*>(held + (3 * product_row + which) * ROW_BYTES);
        float2 found[N] = {};
        auto add = [&](const uint4& weights, const uint4& input, float2& to) {
            const u32 pairs[4] = {weights.x, weights.y, weights.z, weights.w}, inputs[4] = {input.x, input.y, input.z, input.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 a = widen(pairs[i]), b = widen(inputs[i]);
                to.x = fmaf(a.x, b.x, to.x);
                to.y = fmaf(a.y, b.y, to.y);
            }
        };
        if (KEPT > 0) {
#pragma unroll
            for (int j = 0; j < KEPT; j++) {
                const int chunk = part * 32 + lane + j * 32 * PARTS;
                if (CHUNKS % (32 * PARTS) == 0 || chunk < CHUNKS) add(row[chunk], mine[j], found[0]);
            }
        } else {
#pragma unroll 4
            for (int chunk = part * 32 + lane; chunk < CHUNKS; chunk += 32 * PARTS) {
                const uint4 weights = row[chunk];
#pragma unroll
                for (int n = 0; n < N; n++) add(weights, given[n * CHUNKS + chunk], found[n]);
            }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float sum = sum_of_warp(found[n].x + found[n].y);
            if (lane == 0) products[buffer][product_row][which][part][n] = sum;
        }
    };
    auto release = [&](int stage) {
        __syncwarp();
        if (lane == 0) barrier_arrive(&empty[stage]);
    };

    if (LATER > 0) {  // the mean square of each input; the first stage's barrier makes it visible to all warps
#pragma unroll
        for (int n = 0; n < N; n++) {
            float square = 0.0f;
            for (int chunk = thread; chunk < CHUNKS; chunk += CONSUMERS) {
                const uint4 input = given[n * CHUNKS + chunk];
                const u32 pairs[4] = {input.x, input.y, input.z, input.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 x = widen(pairs[i]);
                    square = fmaf(x.x, x.x, fmaf(x.y, x.y, square));
                }
            }
            square = sum_of_warp(square);
            if (lane == 0) squares[warp][n] = square;
        }
    }
    for (int index = 0; index < later_stages; index++) {
        const int stage = index % STAGES, rows = min(PRODUCTS, later_rows - index * PRODUCTS), buffer = index % 2;
        barrier_wait(&full[stage], (index / STAGES) & 1);
        if (product < rows) multiply(ring + stage * STAGE_BYTES, buffer);
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
        release(stage);
        if (thread < rows * tokens) {
            const int row = thread % rows, n = thread / rows, h = later_first + index * PRODUCTS + row;
            float square = 0.0f, sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) square += squares[w][n];
#pragma unroll
            for (int p = 0; p < PARTS; p++) sum += products[buffer][row / 2][row % 2][p][n];
            const float x = sum / sqrtf(square / E + epsilon) + later_bias[h];
            later_inner[n * LATER + h] = x / (1.0f + expf(-x));
        }
    }
    for (int index = 0; index < stages; index++) {
        const int place = later_stages + index, stage = place % STAGES, rows = min(ROWS, neurons - index * ROWS), buffer = place % 2;
        const unsigned char* const held = ring + stage * STAGE_BYTES;
        barrier_wait(&full[stage], (place / STAGES) & 1);
        if (product_row < rows) multiply(held, buffer);
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (row >= rows) break;
            const u32 keepers = list[index * ROWS + row] >> 24;
            float x[N];
#pragma unroll
            for (int n = 0; n < N; n++) {
                float sum[2] = {0.0f, 0.0f};
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
                    sum[0] += products[buffer][row][0][p][n];
                    sum[1] += products[buffer][row][1][p][n];
                }
                x[n] = N == 1 || (keepers >> n & 1) ? round_half(activate(sum[0]) * sum[1]) : 0.0f;
            }
            const uint4* const added = reinterpret_cast<const uint4*>(held + (3 * row + 2) * ROW_BYTES);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const int chunk = i * CONSUMERS + thread;
                if (OWN * CONSUMERS == CHUNKS || chunk < CHUNKS) {
                    const uint4 weights = added[chunk];
                    const u32 pairs[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float2 w = widen(pairs[j]);
#pragma unroll
                        for (int n = 0; n < N; n++) {
                            sums[n][i][2 * j] = fmaf(x[n], w.x, sums[n][i][2 * j]);
                            sums[n][i][2 * j + 1] = fmaf(x[n], w.y, sums[n][i][2 * j + 1]);
                        }
                    }
                }
            }
        }
        release(stage);
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (n >= tokens) break;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int chunk = i * CONSUMERS + thread;
            if (OWN * CONSUMERS != CHUNKS && chunk >= CHUNKS) continue;
            const float* const own_sums = sums[n][i];
            float4* const to = partial + ((static_cast<long long>(blockIdx.x) * tokens + n) * CHUNKS + chunk) * 2;
            to[0] = float4{own_sums[0], own_sums[1], own_sums[2], own_sums[3]};
            to[1] = float4{own_sums[4], own_sums[5], own_sums[6], own_sums[7]};
        }
    }
}
