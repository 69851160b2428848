// Products of 16-bit matrices with a few vectors at once, on tensor cores; `steps_sm80.cuh` is placed before it.
//
// There is one block per multiprocessor. It takes tiles of 16 rows, one after the other, and each of its warps multiplies
// a part of every row. Weights go from memory to registers, in batches: while a warp multiplies one batch, the next is on
// its way. A lane has 8 weights of a row, which lie next to each other, and the same 8 elements of a vector. So the
// elements' order in a product is not that in memory, but the same for both.
//
// Defined before this file: E, a multiple of 8; N vectors, 2 to 8; GATED (rows are neurons: gate · x, activated, times
// up · x; else up to three matrices, one below the other).

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int CHUNKS = E / 8;                     // pieces of 16 bytes of a row
constexpr int STRIDE = (CHUNKS + 7) / 8 * 8 + 4;  // chunks between vectors: two lanes read from different banks
constexpr int LOADS = 4;                          // chunks of a row that a lane has in a batch
constexpr int BATCH = 4 * LOADS * WARPS, BATCHES = (CHUNKS + BATCH - 1) / BATCH;  // chunks of a batch, batches of a tile
constexpr int ROWS = GATED ? 8 : 16;                                              // rows, or neurons, of a tile
constexpr int VECTOR_WARPS = WARPS / N, VECTOR_THREADS = 32 * VECTOR_WARPS;       // that set a vector

__device__ __forceinline__ uint4 load_once(const uint4* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
}

struct Batch {
    uint4 above[LOADS], below[LOADS];  // of the rows lane / 4 and lane / 4 + 8 of a tile
};

// output = input · rowsᵀ + bias + residual, of the model's type. The input is x + added, or its RMS norm.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
products(const uint4* x,                      // [N, E]
         const uint4* added,                  // [N, E] or null
         const uint4* __restrict__ norm,      // [E] or null
         uint4* total,                        // [N, E], out, unless `added` is null: x + added
         const uint4* __restrict__ first,     // [first_rows, E], or gate [R, E]
         const uint4* __restrict__ second,    // [second_rows, E], or up [R, E]
         const uint4* __restrict__ third,     // [R - first_rows - second_rows, E]
         const float* __restrict__ bias,      // [R] or null
         const unsigned short* residual,      // [N, R] or null
         unsigned short* output,              // [N, R], out
         int R, int first_rows, int second_rows, float epsilon) {
    extern __shared__ __align__(16) uint4 inputs[];  // [N, STRIDE]
    __shared__ float parts[2][WARPS][16][N], squares[WARPS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int tiles = (R + ROWS - 1) / ROWS, own = (tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
    const int batches = own * BATCHES;

    // The address of a row; of the last one if there are fewer.
    const auto row_of = [&](int row) {
        row = min(row, R - 1);
        const int both = first_rows + second_rows;
        if (row < first_rows) return first + static_cast<long long>(row) * CHUNKS;
        if (row < both) return second + static_cast<long long>(row - first_rows) * CHUNKS;
        return third + static_cast<long long>(row - both) * CHUNKS;
    };
    const auto chunk_of = [&](int i, int s) { return (i % BATCHES * WARPS + warp) * 4 * LOADS + 4 * s + t; };
    const auto inside = [&](int chunk) { return CHUNKS % BATCH == 0 || chunk < CHUNKS; };
    const auto load = [&](int i, Batch& to) {  // batch i of this block
        if (i >= batches) return;
        const int row = (blockIdx.x + i / BATCHES * gridDim.x) * ROWS + g;
        const uint4* const above = GATED ? first + static_cast<long long>(min(row, R - 1)) * CHUNKS : row_of(row);
        const uint4* const below = GATED ? second + static_cast<long long>(min(row, R - 1)) * CHUNKS : row_of(row + 8);
#pragma unroll
        for (int s = 0; s < LOADS; s++) {
            const int chunk = chunk_of(i, s);
            to.above[s] = inside(chunk) ? load_once(above + chunk) : uint4{0, 0, 0, 0};
            to.below[s] = inside(chunk) ? load_once(below + chunk) : uint4{0, 0, 0, 0};
        }
    };

    Batch even, odd;
    load(0, even);
    load(1, odd);
    wait_for_previous();
    start_next();

    const int vector = warp / VECTOR_WARPS, place = thread % VECTOR_THREADS;
    float square = 0.0f;
    if (vector < N) {
#pragma unroll 4
        for (int chunk = place; chunk < CHUNKS; chunk += VECTOR_THREADS) {
            const int at = vector * CHUNKS + chunk;
            uint4 piece = x[at];
            if (added != nullptr || norm != nullptr) {
                float values[8], more[8];
                widen8(piece, values);
                widen8(added != nullptr ? added[at] : uint4{0, 0, 0, 0}, more);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    values[k] = round_half(values[k] + more[k]);
                    square = fmaf(values[k], values[k], square);
                }
                piece = narrow8(values);
                if (added != nullptr && blockIdx.x == 0) total[at] = piece;
            }
            inputs[vector * STRIDE + chunk] = piece;
        }
    }
    if (norm != nullptr) {
        square = sum_of_warp(square);
        if (lane == 0) squares[warp] = square;
        __syncthreads();
        if (vector < N) {
            square = 0.0f;
#pragma unroll
            for (int w = 0; w < VECTOR_WARPS; w++) square += squares[vector * VECTOR_WARPS + w];
            const float scale = 1.0f / sqrtf(square / E + epsilon);
            for (int chunk = place; chunk < CHUNKS; chunk += VECTOR_THREADS) {  // those that this thread has set
                float values[8], weights[8];
                widen8(inputs[vector * STRIDE + chunk], values);
                widen8(norm[chunk], weights);
#pragma unroll
                for (int k = 0; k < 8; k++) values[k] *= weights[k] * scale;
                inputs[vector * STRIDE + chunk] = narrow8(values);
            }
        }
    }
    __syncthreads();

    float sums[4] = {};  // of the rows g (0, 1) and g + 8 (2, 3), for the vectors 2 t and 2 t + 1
    const auto use = [&](int i, const Batch& given) {
#pragma unroll
        for (int s = 0; s < LOADS; s++) {
            const int chunk = chunk_of(i, s);
            const uint4 piece = g < N && inside(chunk) ? inputs[g * STRIDE + chunk] : uint4{0, 0, 0, 0};
            multiply(sums, given.above[s].x, given.below[s].x, given.above[s].y, given.below[s].y, piece.x, piece.y);
            multiply(sums, given.above[s].z, given.below[s].z, given.above[s].w, given.below[s].w, piece.z, piece.w);
        }
        if (i % BATCHES < BATCHES - 1) return;
        const int number = i / BATCHES, tile = blockIdx.x + number * gridDim.x;
        float(&of_warps)[WARPS][16][N] = parts[number % 2];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (2 * t + k % 2 < N) of_warps[warp][g + k / 2 * 8][2 * t + k % 2] = sums[k];
            sums[k] = 0.0f;
        }
        // The threads that add up a tile's parts change from tile to tile.
        const int which = (thread + number * 16 * N) % THREADS, row = which / N, n = which % N, r = tile * ROWS + row;
        const bool writes = which < ROWS * N && r < R;
        const int at = n * R + r;
        const float more = writes && bias != nullptr ? bias[r] : 0.0f;
        const float before = writes && residual != nullptr ? widen(residual[at]).x : 0.0f;
        __syncthreads();
        if (!writes) return;
        float y = more, of_up = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            y += of_warps[w][row][n];
            if (GATED) of_up += of_warps[w][row + 8][n];
        }
        if (GATED) y = activate(y) * of_up;
        if (residual != nullptr) y = round_half(y) + before;
        output[at] = half_of(y);
    };
#pragma unroll 1
    for (int i = 0; i < batches; i += 2) {
        use(i, even);
        load(i + 2, even);
        if (i + 1 < batches) use(i + 1, odd);
        load(i + 3, odd);
    }
}
