// Products of packed rows of 4 bits (`packed.py`) with one vector, on tensor cores (Ampere to Hopper).
//
// A block takes 16 rows of each matrix. Its four warps share the columns. A chunk is 32 weights of a row, 16 bytes; four
// lanes read four chunks of a row. A shift and a mask make two weights two numbers of 16 bits, OFFSET + k. A product's 8
// columns hold the inputs of one chunk each (four are empty), so that its sums are those of single chunks, which have
// levels of their own. A product with ones gives the sums of inputs that belong to these levels.
//
// `down` adds rows times one number each, with single multiplications: it has no sum along a row.
//
// Defined before this file: E; GROUP, weights that share levels; BFLOAT (else float16); ACTIVATION (0 silu, 1 gelu, 2
// gelu_tanh, 3 relu); EARLY (programmatic dependent launch, on Hopper).

constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 16;
constexpr int CHUNKS = E / 32, PER_GROUP = GROUP / 32, GROUPS = E / GROUP;
constexpr int WORDS = (E / 2 + (2 * GROUPS + 3) / 4 * 4 + 8 + 15) / 16 * 4;  // of a packed row
constexpr int UNITS_AT = E / 8 + (2 * GROUPS + 3) / 4;                       // words before a row's units
constexpr int QUADS = (CHUNKS + 3) / 4, EACH = (QUADS + WARPS - 1) / WARPS;  // chunks by four, and those of a warp
constexpr u32 MAGIC = BFLOAT ? 0x43004300u : 0x64006400u, ONES = BFLOAT ? 0x3F803F80u : 0x3C003C00u;
constexpr float OFFSET = BFLOAT ? 128.0f : 1024.0f;
constexpr int DOWN_ROWS = 8;  // rows of `down` that are on their way together
static_assert(E % GROUP == 0 && GROUP % 32 == 0, "groups are whole chunks");

__device__ __forceinline__ void wait_for_previous() {
    if (EARLY) asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void start_next() {
    if (EARLY) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

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

// Rounds to the model's type, where a model rounds too.
__device__ __forceinline__ unsigned short half_of(float x) {
    unsigned short half;
    if (BFLOAT)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(x));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
__device__ __forceinline__ float round_half(float x) { return widen(half_of(x)).x; }

__device__ __forceinline__ float activate(float x) {
    if (ACTIVATION == 1) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    if (ACTIVATION == 3) return x < 0.0f ? 0.0f : x;  // NaN stays
    const float y = ACTIVATION == 0 ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);  // ½ (1 + tanh y) = σ(2 y)
    return x / (1.0f + expf(-y));
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
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

// OFFSET + k of the weights with numbers 2 s and 2 s + 1 in a word, as two numbers of 16 bits.
__device__ __forceinline__ u32 pair(u32 word, int s) {
    u32 result;
    asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(result) : "r"(word >> 4 * s), "r"(MAGIC));  // (a & b) | c
    return result;
}

__device__ __forceinline__ uint4 load_once(const u32* from) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(from));
    return value;
}

// Steps (lower half) and lows (upper half) of two neighbouring chunks of a row, a byte each.
__device__ __forceinline__ u32 load_levels(const u32* row, int chunk) {
    const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(row) + E / 2 + chunk / PER_GROUP;
    u32 steps, lows;
    if (PER_GROUP == 1 && GROUPS % 2 == 0) {
        steps = *reinterpret_cast<const unsigned short*>(bytes);
        lows = *reinterpret_cast<const unsigned short*>(bytes + GROUPS);
    } else {
        const int next = chunk + 1 < CHUNKS && PER_GROUP == 1;
        steps = bytes[0] | bytes[next] << 8;
        lows = bytes[GROUPS] | bytes[GROUPS + next] << 8;
    }
    return steps | lows << 16;
}

// The weights of a batch of quads, of this lane's chunk of two rows, and the levels of two of their chunks.
template <int MATRICES>
struct Held {
    static constexpr int BATCH = EACH < 8 / MATRICES ? EACH : 8 / MATRICES;
    uint4 words[BATCH][MATRICES][2];
    u32 levels[BATCH][MATRICES][2];
};

template <int MATRICES>
__device__ __forceinline__ void hold(Held<MATRICES>& held, const u32* const (&rows)[MATRICES][2], int first, int end) {
    const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
    for (int b = 0; b < Held<MATRICES>::BATCH; b++) {
        const int quad = first + b, chunk = 4 * quad + t;
        const bool inside = quad < end && chunk < CHUNKS;
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                held.words[b][m][r] = inside ? load_once(rows[m][r] + 4 * chunk) : uint4{0, 0, 0, 0};
                const int own = 4 * quad + 2 * t;  // the chunks whose sums this lane gets
                held.levels[b][m][r] = t < 2 && quad < end && own < CHUNKS ? load_levels(rows[m][r], own) : 0;
            }
        }
    }
}

// Adds the products of a batch to sums, for two rows: of steps, and of lows.
template <int MATRICES>
__device__ __forceinline__ void use(const Held<MATRICES>& held, const uint4* x, int first, int end, float (&sums)[MATRICES][2][2]) {
    const int lane = threadIdx.x % 32, t = lane % 4, column = lane / 4;
#pragma unroll
    for (int b = 0; b < Held<MATRICES>::BATCH; b++) {
        const int quad = first + b, chunk = 4 * quad + t;
        u32 inputs[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const bool own = column == t && quad < end && chunk < CHUNKS;
            const uint4 values = own ? x[4 * chunk + j] : uint4{0, 0, 0, 0};
            inputs[j][0] = values.x, inputs[j][1] = values.y, inputs[j][2] = values.z, inputs[j][3] = values.w;
        }
        float of_inputs[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            multiply(of_inputs, ONES, ONES, ONES, ONES, inputs[j][0], inputs[j][1]);
            multiply(of_inputs, ONES, ONES, ONES, ONES, inputs[j][2], inputs[j][3]);
        }
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            const uint4 above = held.words[b][m][0], below = held.words[b][m][1];
            const u32 up[4] = {above.x, above.y, above.z, above.w}, down[4] = {below.x, below.y, below.z, below.w};
            float products[4] = {};
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int s = 0; s < 4; s += 2)
                    multiply(products, pair(up[j], s), pair(down[j], s), pair(up[j], s + 1), pair(down[j], s + 1),
                             inputs[j][s], inputs[j][s + 1]);
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const u32 levels = held.levels[b][m][r];
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const float step = static_cast<float>(levels >> 8 * c & 0xFF);
                    const float low = static_cast<float>(static_cast<int>(levels << (8 - 8 * c)) >> 24);
                    sums[m][r][0] = fmaf(step, products[2 * r + c] - OFFSET * of_inputs[c], sums[m][r][0]);
                    sums[m][r][1] = fmaf(low, of_inputs[c], sums[m][r][1]);
                }
            }
        }
    }
}

// The products of the block's rows with x, float32 [MATRICES][ROWS] in shared memory. `rows` are this lane's two rows of
// each matrix, lane / 4 and 8 + lane / 4. early: x may be read only after the previous kernel has ended.
template <int MATRICES>
__device__ __forceinline__ void multiply_rows(const u32* const (&rows)[MATRICES][2], const uint4* x, bool early,
                                              float (&results)[MATRICES][ROWS]) {
    __shared__ float parts[WARPS][MATRICES][ROWS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, begin = warp * EACH, end = min(begin + EACH, QUADS);
    float sums[MATRICES][2][2] = {};
    Held<MATRICES> held;
    hold(held, rows, begin, end);
    if (early) wait_for_previous();
    constexpr int BATCH = Held<MATRICES>::BATCH;
#pragma unroll 1
    for (int first = begin; first < end; first += BATCH) {
        use(held, x, first, end, sums);
        if (first + BATCH < end) hold(held, rows, first + BATCH, end);
    }
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float* const units = reinterpret_cast<const float*>(rows[m][r]) + UNITS_AT;
            float sum = sums[m][r][0] * units[0] + sums[m][r][1] * units[1];
            sum += __shfl_xor_sync(~0u, sum, 1);  // the first two of four lanes have chunks
            if (lane % 4 == 0) parts[warp][m][8 * r + lane / 4] = sum;
        }
    }
    __syncthreads();
    if (threadIdx.x < MATRICES * ROWS) {
        const int m = threadIdx.x / ROWS, row = threadIdx.x % ROWS;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += parts[w][m][row];
        results[m][row] = sum;
    }
    __syncthreads();
}

// output = x · rowsᵀ + bias + residual, of the model's type.
extern "C" __global__ void __launch_bounds__(THREADS)
project(const uint4* x,                        // [E]; the previous kernel may have written it
        const u32* __restrict__ matrix,        // packed [R, WORDS]
        const float* __restrict__ bias,        // [R] or null
        const unsigned short* residual,        // [R] or null
        unsigned short* output,                // [R], out
        int R) {
    __shared__ float results[1][ROWS];
    start_next();
    const int lane = threadIdx.x % 32, first = blockIdx.x * ROWS;
    const u32* const rows[1][2] = {{matrix + static_cast<long long>(min(first + lane / 4, R - 1)) * WORDS,
                                    matrix + static_cast<long long>(min(first + 8 + lane / 4, R - 1)) * WORDS}};
    multiply_rows<1>(rows, x, true, results);
    const int row = first + threadIdx.x;
    if (threadIdx.x >= ROWS || row >= R) return;
    float y = results[0][threadIdx.x] + (bias == nullptr ? 0.0f : bias[row]);
    if (residual != nullptr) y = round_half(y) + widen(residual[row]).x;
    output[row] = half_of(y);
}

// The product of a row of 16 bits with x, in all lanes of a warp, and the sum of squares of x.
__device__ __forceinline__ float2 multiply_full(const uint4* __restrict__ row, const uint4* x) {
    float product = 0.0f, square = 0.0f;
    for (int i = threadIdx.x % 32; i < E / 8; i += 32) {
        const uint4 a = row[i], b = x[i];
        const u32 ours[4] = {a.x, a.y, a.z, a.w}, inputs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 w = widen(ours[j]), v = widen(inputs[j]);
            product = fmaf(w.x, v.x, fmaf(w.y, v.y, product));
            square = fmaf(v.x, v.x, fmaf(v.y, v.y, square));
        }
    }
    return float2{sum_of_warp(product), sum_of_warp(square)};
}

// act(gate · x) · (up · x) of the listed neurons and of those with 16 bits, and a later layer's bottleneck.
extern "C" __global__ void __launch_bounds__(THREADS)
gate_up(const uint4* x,                                 // [E], as all inputs written by earlier kernels
        const u32* __restrict__ gate,                   // packed [D, WORDS]
        const u32* __restrict__ up,                     // packed [D, WORDS]
        const int* list,                                // [D], the kept neurons; null: all
        const int* total,                               // how many they are
        float* inner,                                   // [D], out: their values, in the same order
        const int* __restrict__ spared,                 // [P], neurons with 16 bits
        const uint4* __restrict__ spared_gate,          // [P, E]
        const uint4* __restrict__ spared_up,            // [P, E]
        const u32* __restrict__ masks,                  // [K, mask_words]
        const float* values, const int* ids,            // [candidates], for the mask
        float* spared_inner,                            // [P], out: their values, 0 for those that the mask drops
        const uint4* __restrict__ later,                // [H, E]
        const float* __restrict__ later_bias,           // [H]
        float* later_inner,                             // [H], out: SiLU(rms_norm(x) · laterᵀ + bias)
        int D, int blocks, int P, int H, int mask_words, int candidates, float epsilon) {
    __shared__ float results[2][ROWS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = blockIdx.x;
    const bool every = list == nullptr;
    start_next();
    if (!every || block >= blocks) wait_for_previous();
    if (block < blocks) {
        const int count = every ? D : *total;
        for (int first = block * ROWS; first < count; first += blocks * ROWS) {
            const u32* rows[2][2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int rank = min(first + 8 * r + lane / 4, count - 1);
                const long long neuron = every ? rank : list[rank];
                rows[0][r] = gate + neuron * WORDS;
                rows[1][r] = up + neuron * WORDS;
            }
            multiply_rows<2>(rows, x, every && first == block * ROWS, results);
            if (threadIdx.x < ROWS && first + threadIdx.x < count)
                inner[first + threadIdx.x] = round_half(activate(results[0][threadIdx.x]) * results[1][threadIdx.x]);
            __syncthreads();
        }
    } else if (block < blocks + P) {
        const int place = block - blocks;
        if (warp < 2) {
            const uint4* const row = (warp == 0 ? spared_gate : spared_up) + static_cast<long long>(place) * (E / 8);
            const float product = multiply_full(row, x).x;
            if (lane == 0) results[warp][0] = product;
        }
        bool kept = true;
        if (masks != nullptr) {  // the id of the largest value, ties to the lowest id; every warp finds it
            float best = -__int_as_float(0x7F800000);
            int id = 0x7FFFFFFF;
            for (int i = lane; i < candidates; i += 32)
                if (values[i] > best || (values[i] == best && ids[i] < id)) best = values[i], id = ids[i];
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) {
                const float value = __shfl_xor_sync(~0u, best, distance);
                const int other = __shfl_xor_sync(~0u, id, distance);
                if (value > best || (value == best && other < id)) best = value, id = other;
            }
            id = id == 0x7FFFFFFF ? 0 : id;
            const int neuron = spared[place];
            kept = masks[static_cast<long long>(id) * mask_words + neuron / 32] >> neuron % 32 & 1;
        }
        __syncthreads();
        if (threadIdx.x == 0) spared_inner[place] = kept ? round_half(activate(results[0][0]) * results[1][0]) : 0.0f;
    } else {
        const int h = (block - blocks - P) * WARPS + warp;
        if (h >= H) return;
        const float2 sums = multiply_full(later + static_cast<long long>(h) * (E / 8), x);
        const float y = sums.x / sqrtf(sums.y / E + epsilon) + later_bias[h];
        if (lane == 0) later_inner[h] = y / (1.0f + expf(-y));
    }
}

// Each part's sum of the listed neurons' rows times their values. A thread has one chunk of columns.
extern "C" __global__ void __launch_bounds__(THREADS)
down(const int* list, const int* total,     // as for `gate_up`
     const float* inner,                    // [D], their values
     const u32* __restrict__ matrix,        // packed [D, WORDS]
     float4* partial,                       // [parts, E], out
     int D, int parts) {
    wait_for_previous();  // in this order: `finish` reads what earlier kernels wrote before it waits
    start_next();
    const int chunk = blockIdx.x / parts * THREADS + threadIdx.x, part = blockIdx.x % parts;
    if (chunk >= CHUNKS) return;
    const int count = list == nullptr ? D : *total, group = chunk / PER_GROUP;
    const int first = static_cast<int>(static_cast<long long>(part) * count / parts);
    const int last = static_cast<int>(static_cast<long long>(part + 1) * count / parts);
    float sums[32] = {}, base = 0.0f;
#pragma unroll 1
    for (int start = first; start < last; start += DOWN_ROWS) {
        uint4 words[DOWN_ROWS];
        float steps[DOWN_ROWS], lows[DOWN_ROWS];
#pragma unroll
        for (int i = 0; i < DOWN_ROWS; i++) {
            const int rank = min(start + i, last - 1);
            const long long neuron = list == nullptr ? rank : list[rank];
            const u32* const row = matrix + neuron * WORDS;
            words[i] = load_once(row + 4 * chunk);
            const float value = start + i < last ? inner[rank] : 0.0f;
            const float* const units = reinterpret_cast<const float*>(row) + UNITS_AT;
            const unsigned char* const levels = reinterpret_cast<const unsigned char*>(row) + E / 2 + group;
            steps[i] = value * units[0] * static_cast<float>(levels[0]);
            lows[i] = value * units[1] * static_cast<float>(static_cast<signed char>(levels[GROUPS]));
        }
#pragma unroll
        for (int i = 0; i < DOWN_ROWS; i++) {
            const u32 own[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
            base += fmaf(-OFFSET, steps[i], lows[i]);
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    const float2 two = widen(pair(own[j], s));
                    sums[8 * j + 2 * s] = fmaf(steps[i], two.x, sums[8 * j + 2 * s]);
                    sums[8 * j + 2 * s + 1] = fmaf(steps[i], two.y, sums[8 * j + 2 * s + 1]);
                }
            }
        }
    }
    float4* const to = partial + (static_cast<long long>(part) * CHUNKS + chunk) * 8;
#pragma unroll
    for (int j = 0; j < 8; j++)
        to[j] = float4{sums[4 * j] + base, sums[4 * j + 1] + base, sums[4 * j + 2] + base, sums[4 * j + 3] + base};
}
