// Products of 16-bit matrices with one vector or a few, on tensor cores; `steps_sm80.cuh` is placed before it.
//
// There is one block per multiprocessor. It takes tiles of 16 rows, one after the other, and each of its warps multiplies
// a part of every row. Asynchronous copies bring the weights into shared memory, several batches ahead. A lane copies and
// multiplies the same pieces: 8 weights of a row, which lie next to each other, with the same 8 elements of a vector. So
// lanes need not wait for each other, and the elements' order in a product is not that in memory, but the same for both.
//
// Loads into registers would depend on the L1 cache's size, of which kernels with much shared memory leave little for
// those after them: they took up to 60 % longer.
//
// Defined before this file: E, a multiple of 8; N vectors, up to 8; LOADS, chunks of a row that a lane has in a batch;
// DEPTH, batches on their way; GATED (rows are neurons: gate · x, activated, times up · x; else up to three matrices, one
// below the other).

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int CHUNKS = E / 8;                     // pieces of 16 bytes of a row
constexpr int STRIDE = (CHUNKS + 7) / 8 * 8 + 4;  // chunks between vectors: two lanes read from different banks
constexpr int BATCH = 4 * LOADS * WARPS, BATCHES = (CHUNKS + BATCH - 1) / BATCH;  // chunks of a batch, batches of a tile
constexpr int ROWS = GATED ? 8 : 16;                                              // rows, or neurons, of a tile
constexpr int VECTOR_WARPS = WARPS / N, VECTOR_THREADS = 32 * VECTOR_WARPS;       // that set a vector

// A batch of a warp: of the rows lane / 4 and lane / 4 + 8 of a tile.
struct Batch {
    uint4 above[LOADS][32], below[LOADS][32];
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
    extern __shared__ __align__(16) uint4 memory[];
    Batch* const ring = reinterpret_cast<Batch*>(memory) + threadIdx.x / 32 * DEPTH;  // of this warp
    uint4* const inputs = memory + DEPTH * WARPS * (sizeof(Batch) / 16);              // [N, STRIDE]
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
    const auto copy = [&](int i) {  // starts to copy batch i of this block, if there is one
        if (i < batches) {
            Batch& to = ring[i % DEPTH];
            const int row = (blockIdx.x + i / BATCHES * gridDim.x) * ROWS + g;
            const uint4* const above = GATED ? first + static_cast<long long>(min(row, R - 1)) * CHUNKS : row_of(row);
            const uint4* const below = GATED ? second + static_cast<long long>(min(row, R - 1)) * CHUNKS : row_of(row + 8);
#pragma unroll
            for (int s = 0; s < LOADS; s++) {
                const int chunk = chunk_of(i, s);
                if (!inside(chunk)) continue;
                copy_piece(&to.above[s][lane], above + chunk);
                copy_piece(&to.below[s][lane], below + chunk);
            }
        }
        end_group();
    };

#pragma unroll 1
    for (int i = 0; i < DEPTH; i++) copy(i);
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
    const auto use = [&](int i) {
        const Batch& given = ring[i % DEPTH];
#pragma unroll
        for (int s = 0; s < LOADS; s++) {
            const int chunk = chunk_of(i, s);
            if (!inside(chunk - t)) continue;  // for the whole warp
            const uint4 none = uint4{0, 0, 0, 0};
            const uint4 above = inside(chunk) ? given.above[s][lane] : none;
            const uint4 below = inside(chunk) ? given.below[s][lane] : none;
            const uint4 piece = g < N && inside(chunk) ? inputs[g * STRIDE + chunk] : none;
            multiply(sums, above.x, below.x, above.y, below.y, piece.x, piece.y);
            multiply(sums, above.z, below.z, above.w, below.w, piece.z, piece.w);
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
    for (int i = 0; i < batches; i++) {
        wait_for_groups<DEPTH - 1>();  // of this lane, which are the pieces that it multiplies
        use(i);
        copy(i + DEPTH);
    }
}
