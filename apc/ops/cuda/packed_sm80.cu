// Products of packed rows of 4 bits (`packed.py`) with one vector, on tensor cores (Ampere to Hopper).
//
// A block takes 16 rows: of one matrix, or of gate and up for 8 neurons. Its four warps share the columns. A chunk is
// 32 weights of a row, 16 bytes; four lanes read four chunks of a row: a quad. A shift and a mask make two weights two
// numbers of 16 bits, OFFSET + k. A product's 8 columns hold the inputs of one chunk each (four are empty), so that its
// sums are those of single chunks, which have levels of their own. A block copies its input into shared memory, where
// it also sums each chunk's inputs.
//
// `down` adds rows times one number each, with single multiplications: it has no sum along a row.
//
// These kernels take tens of microseconds, so a chain of loads that depend on each other takes much of their time.
// Loads that depend on no other load are issued together. Weights come by asynchronous copies: a thread may wait for
// the oldest of them while the others stay on their way. Loads into registers share a few counters instead, and waiting
// for one of them waits for all with its counter.
//
// Defined before this file: E; GROUP, weights that share levels; BFLOAT (else float16); ACTIVATION (0 silu, 1 gelu, 2
// gelu_tanh, 3 relu); EARLY (programmatic dependent launch, on Hopper).

constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 16, NEURONS = ROWS / 2;
constexpr int CHUNKS = E / 32, PER_GROUP = GROUP / 32, GROUPS = E / GROUP;
constexpr int WORDS = (E / 2 + (2 * GROUPS + 3) / 4 * 4 + 8 + 15) / 16 * 4;  // of a packed row
constexpr int UNITS_AT = E / 8 + (2 * GROUPS + 3) / 4;                       // words before a row's units
constexpr int QUADS = (CHUNKS + 3) / 4, EACH = (QUADS + WARPS - 1) / WARPS;  // chunks by four, and those of a warp
constexpr u32 MAGIC = BFLOAT ? 0x43004300u : 0x64006400u;
constexpr float OFFSET = BFLOAT ? 128.0f : 1024.0f;
constexpr int PROJECT_QUADS = 8, NEURON_QUADS = 4;  // of a warp, on their way together
constexpr int STAGES = 12;  // rows of `down` on their way, and the one that is added
constexpr int BLOCKS = 7;   // of `gate_up` on a multiprocessor: without a limit it takes twice as many registers
static_assert(E % GROUP == 0 && GROUP % 32 == 0, "groups are whole chunks");

__device__ __forceinline__ void wait_for_previous() {
    if (EARLY) asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void start_next() {
    if (EARLY) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
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

// The weights with numbers 2 s and 2 s + 1 in a word, as the lowest bits of two numbers of 16 bits.
__device__ __forceinline__ u32 pair(u32 word, int s, u32 magic) {
    u32 result;
    asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(result) : "r"(word >> 4 * s), "r"(magic));  // (a & b) | c
    return result;
}

// Copies to shared memory, which a thread waits for in the order of their groups.
__device__ __forceinline__ void copy_words(uint4* to, const u32* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :: "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_word(u32* to, const u32* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                 :: "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}

// A block's input, in shared memory: zeros fill its last quad.
struct Input {
    uint4 values[16 * QUADS];
    float sums[4 * QUADS];  // of each chunk
};

constexpr bool EVEN = 4 * CHUNKS % THREADS == 0;  // all threads copy equally much

// Starts to copy a vector.
__device__ __forceinline__ void start_input(Input& input, const uint4* x) {
#pragma unroll 4
    for (int first = 0; first < 16 * QUADS; first += THREADS) {
        const int i = first + threadIdx.x;
        if (EVEN || i < 4 * CHUNKS)
            copy_words(&input.values[i], reinterpret_cast<const u32*>(x + i));
        else if (i < 16 * QUADS)
            input.values[i] = uint4{0, 0, 0, 0};
    }
    end_group();
}

// Waits for the copy, after which `LATER` groups began, and sums its chunks.
template <int LATER>
__device__ __forceinline__ void end_input(Input& input) {
    wait_for_groups<LATER>();
#pragma unroll 4
    for (int first = 0; first < 16 * QUADS; first += THREADS) {
        const int i = first + threadIdx.x;
        const uint4 values = EVEN || i < 16 * QUADS ? input.values[i] : uint4{0, 0, 0, 0};  // which this thread copied
        const float2 a = widen(values.x), b = widen(values.y), c = widen(values.z), d = widen(values.w);
        float sum = ((a.x + a.y) + (b.x + b.y)) + ((c.x + c.y) + (d.x + d.y));
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if ((EVEN || i < 16 * QUADS) && i % 4 == 0) input.sums[i / 4] = sum;
    }
    __syncthreads();
}

// Where the levels of two neighbouring chunks, of which the first is even, begin in a row: bytes. They lie in one word,
// except in rows with an odd number of groups of 32.
constexpr bool ODD = PER_GROUP == 1 && GROUPS % 2 == 1;
__device__ __forceinline__ u32 levels_at(u32 chunk) { return E / 2 + chunk / PER_GROUP; }

// Steps (lower half) and lows of these two chunks, a byte each, from the words that contain them.
__device__ __forceinline__ u32 levels_of(u32 steps, u32 lows, int chunk) {
    const u32 at = levels_at(chunk);
    steps >>= at % 4 * 8, lows >>= (at + GROUPS) % 4 * 8;
    if (PER_GROUP == 1) return (steps & 0xFFFF) | lows << 16;
    return ((steps & 0xFF) | (lows & 0xFF) << 16) * 0x101;
}

__device__ __forceinline__ u32 load_odd_levels(const u32* row, int chunk) {
    const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(row) + levels_at(chunk);
    const int next = chunk + 1 < CHUNKS;
    return bytes[0] | bytes[next] << 8 | (bytes[GROUPS] | bytes[GROUPS + next] << 8) << 16;
}

// A warp's quads on their way, in shared memory: each lane copies what it reads itself, without barriers. It has one
// chunk of two rows, and levels of two chunks: the first two of four lanes have those of the upper row.
template <int ROOM>
struct Ring {
    uint4 words[ROOM][2][THREADS];
    u32 steps[ROOM][THREADS], lows[ROOM][THREADS];
};
// A kernel has 48 KiB of shared memory. The system takes 1 KiB of it on Hopper, and the warps' parts less than another.
constexpr int MOST_ROOM = (46 * 1024 - static_cast<int>(sizeof(Input))) / static_cast<int>(sizeof(Ring<1>));
constexpr int lower(int a, int b) { return a < b ? a : b; }
constexpr int room_for(int quads) { return lower(lower(quads, EACH), MOST_ROOM); }
static_assert(MOST_ROOM > 0, "the input leaves room");

template <int ROOM>
__device__ __forceinline__ void copy_quad(Ring<ROOM>& ring, int place, const u32* const (&rows)[2], int quad, int end) {
    const int t = threadIdx.x % 4, chunk = 4 * quad + t, own = 4 * quad + 2 * (t % 2);
    if (quad < end) {
        // What is not copied belongs to inputs that are zero.
        if (CHUNKS % 4 == 0 || chunk < CHUNKS) {
#pragma unroll
            for (int r = 0; r < 2; r++) copy_words(&ring.words[place][r][threadIdx.x], rows[r] + 4 * chunk);
        }
        if (!ODD && (CHUNKS % 4 == 0 || own < CHUNKS)) {
            const u32* const row = t < 2 ? rows[0] : rows[1];
            copy_word(&ring.steps[place][threadIdx.x], row + levels_at(own) / 4);
            copy_word(&ring.lows[place][threadIdx.x], row + (levels_at(own) + GROUPS) / 4);
        }
    }
    end_group();
}

// Starts the first copies of a warp. Returns the unit of this lane's row, t / 2: of its steps, or of its lows.
template <int ROOM>
__device__ __forceinline__ float start_rows(Ring<ROOM>& ring, const u32* const (&rows)[2]) {
    const int t = threadIdx.x % 4, begin = threadIdx.x / 32 * EACH, end = min(begin + EACH, QUADS);
    const float unit = reinterpret_cast<const float*>(t < 2 ? rows[0] : rows[1])[UNITS_AT + t % 2];
#pragma unroll
    for (int b = 0; b < ROOM; b++) copy_quad(ring, b, rows, begin + b, end);
    return unit;
}

// Adds the products of a quad to sums, for two rows: of steps, and of lows. Only the first two of four lanes have
// meaningful sums.
__device__ __forceinline__ void add_quad(const uint4& above, const uint4& below, u32 levels, const Input& input,
                                         int quad, float (&sums)[2][2]) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    const u32 up[4] = {above.x, above.y, above.z, above.w}, down[4] = {below.x, below.y, below.z, below.w};
    float products[4] = {};
    const uint4* const inputs_of_chunk = input.values + 16 * quad + 4 * t;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const uint4 values = lane / 4 == t ? inputs_of_chunk[j] : uint4{0, 0, 0, 0};
        const u32 inputs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (int s = 0; s < 4; s += 2)
            multiply(products, pair(up[j], s, MAGIC), pair(down[j], s, MAGIC), pair(up[j], s + 1, MAGIC),
                     pair(down[j], s + 1, MAGIC), inputs[s], inputs[s + 1]);
    }
    const float of_inputs[2] = {input.sums[4 * quad + 2 * (t % 2)], input.sums[4 * quad + 2 * (t % 2) + 1]};
    const u32 both[2] = {levels, __shfl_xor_sync(~0u, levels, 2)};
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float step = static_cast<float>(both[r] >> 8 * c & 0xFF);
            const float low = static_cast<float>(static_cast<int>(both[r] << (8 - 8 * c)) >> 24);
            sums[r][0] = fmaf(step, products[2 * r + c] - OFFSET * of_inputs[c], sums[r][0]);
            sums[r][1] = fmaf(low, of_inputs[c], sums[r][1]);
        }
    }
}

// The products of the block's rows with its input: each warp's part. `rows` are this lane's two, lane / 4 and
// 8 + lane / 4, whose copies `start_rows` started.
template <int ROOM>
__device__ __forceinline__ void multiply_rows(Ring<ROOM>& ring, const u32* const (&rows)[2], float unit,
                                              const Input& input, float (&parts)[WARPS][ROWS]) {
    const int own = threadIdx.x, lane = own % 32, t = lane % 4, warp = own / 32;
    const int begin = warp * EACH, end = min(begin + EACH, QUADS);
    float sums[2][2] = {};
    int place = 0;
#pragma unroll 1
    for (int quad = begin; quad < end; quad++) {
        wait_for_groups<ROOM - 1>();  // this quad has arrived
        const int chunk = 4 * quad + 2 * (t % 2);
        const uint4 above = ring.words[place][0][own], below = ring.words[place][1][own];
        u32 levels = 0;
        if (!ODD)
            levels = levels_of(ring.steps[place][own], ring.lows[place][own], chunk);
        else if (chunk < CHUNKS)
            levels = load_odd_levels(t < 2 ? rows[0] : rows[1], chunk);
        add_quad(above, below, levels, input, quad, sums);
        copy_quad(ring, place, rows, quad + ROOM, end);
        place = place + 1 < ROOM ? place + 1 : 0;
    }
    // Lane t gets the sum that belongs to its unit.
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int i = 0; i < 2; i++) sums[r][i] += __shfl_xor_sync(~0u, sums[r][i], 1);
    }
    const float below = __shfl_xor_sync(~0u, t % 2 ? sums[1][1] : sums[1][0], 2);
    float sum = (t < 2 ? (t ? sums[0][1] : sums[0][0]) : below) * unit;
    sum += __shfl_xor_sync(~0u, sum, 1);
    if (t % 2 == 0) parts[warp][4 * t + lane / 4] = sum;
}

__device__ __forceinline__ float sum_of_parts(const float (&parts)[WARPS][ROWS], int row) {
    return (parts[0][row] + parts[1][row]) + (parts[2][row] + parts[3][row]);
}

// output = x · rowsᵀ + bias + residual, of the model's type.
extern "C" __global__ void __launch_bounds__(THREADS)
project(const uint4* x,                        // [E]; the previous kernel may have written it
        const u32* __restrict__ matrix,        // packed [R, WORDS]
        const float* __restrict__ bias,        // [R] or null
        const unsigned short* residual,        // [R] or null
        unsigned short* output,                // [R], out
        int R) {
    __shared__ Input input;
    __shared__ Ring<room_for(PROJECT_QUADS)> ring;
    __shared__ float parts[WARPS][ROWS];
    start_next();
    const int lane = threadIdx.x % 32, first = blockIdx.x * ROWS, row = first + threadIdx.x;
    const u32* const rows[2] = {matrix + static_cast<long long>(min(first + lane / 4, R - 1)) * WORDS,
                                matrix + static_cast<long long>(min(first + 8 + lane / 4, R - 1)) * WORDS};
    const float unit = start_rows(ring, rows);
    const bool writes = threadIdx.x < ROWS && row < R;
    wait_for_previous();
    const float added = writes && bias != nullptr ? bias[row] : 0.0f;
    const float before = writes && residual != nullptr ? widen(residual[row]).x : 0.0f;
    start_input(input, x);
    end_input<0>(input);
    multiply_rows(ring, rows, unit, input, parts);
    __syncthreads();
    if (!writes) return;
    float y = sum_of_parts(parts, threadIdx.x) + added;
    if (residual != nullptr) y = round_half(y) + before;
    output[row] = half_of(y);
}

// The product of a row of 16 bits with x, in all lanes of a warp, and the sum of squares of x.
__device__ __forceinline__ float2 multiply_full(const uint4* __restrict__ row, const uint4* x) {
    float product = 0.0f, square = 0.0f;
#pragma unroll 4
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
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
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
    __shared__ Input input;
    __shared__ Ring<room_for(NEURON_QUADS)> ring;
    __shared__ float parts[WARPS][ROWS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = blockIdx.x;
    const int others = P + (H + WARPS - 1) / WARPS;  // blocks with long loops, which start first
    const bool every = list == nullptr;
    start_next();
    if (!every || block < others) wait_for_previous();
    if (block >= others) {
        const int own = (block - others) * NEURONS;
        int count = D, neuron = min(own + lane / 4, D - 1);
        if (!every) {
            count = *total;
            neuron = list[neuron];  // not an index unless it is one of the first `count`
            start_input(input, x);
        }
        for (int first = own; first < count; first += blocks * NEURONS) {
            const int rank = first + lane / 4;
            if (first > own) neuron = every ? rank : list[min(rank, count - 1)];
            const long long row = rank < count ? neuron : 0;
            const u32* const rows[2] = {gate + row * WORDS, up + row * WORDS};
            const float unit = start_rows(ring, rows);
            if (first == own) {
                if (every) {
                    wait_for_previous();
                    start_input(input, x);
                    end_input<0>(input);
                } else {
                    end_input<room_for(NEURON_QUADS)>(input);
                }
            }
            multiply_rows(ring, rows, unit, input, parts);
            __syncthreads();
            const int i = threadIdx.x;
            if (i < NEURONS && first + i < count)
                inner[first + i] = round_half(activate(sum_of_parts(parts, i)) * sum_of_parts(parts, NEURONS + i));
            __syncthreads();
        }
    } else if (block < P) {
        const int place = block;
        if (warp < 2) {
            const uint4* const row = (warp == 0 ? spared_gate : spared_up) + static_cast<long long>(place) * (E / 8);
            const float product = multiply_full(row, x).x;
            if (lane == 0) parts[warp][0] = product;
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
        if (threadIdx.x == 0) spared_inner[place] = kept ? round_half(activate(parts[0][0]) * parts[1][0]) : 0.0f;
    } else {
        const int h = (block - P) * WARPS + warp;
        if (h >= H) return;
        const float2 sums = multiply_full(later + static_cast<long long>(h) * (E / 8), x);
        const float y = sums.x / sqrtf(sums.y / E + epsilon) + later_bias[h];
        if (lane == 0) later_inner[h] = y / (1.0f + expf(-y));
    }
}

// Rows of `down` on their way: each thread copies what it reads itself, without barriers.
struct Stage {
    uint4 words[THREADS];
    u32 steps[THREADS], lows[THREADS];  // the words with the levels' bytes
};

// Each part's sum of the listed neurons' rows times their values. A thread has one chunk of columns. A part takes every
// `parts`-th neuron: which ones does not depend on their number, which is still on its way.
extern "C" __global__ void __launch_bounds__(THREADS)
down(const int* list, const int* total,     // as for `gate_up`
     const float* inner,                    // [D], their values
     const u32* __restrict__ matrix,        // packed [D, WORDS]
     float4* partial,                       // [parts, E], out
     int D, int parts) {
    __shared__ Stage stages[STAGES];
    __shared__ int neurons[THREADS];
    __shared__ float2 scales[THREADS];  // of a row's steps and lows, times its neuron's value
    const int own = threadIdx.x, chunk = blockIdx.x / parts * THREADS + own, part = blockIdx.x % parts;
    const u32 step_at = levels_at(chunk), low_at = step_at + GROUPS;  // bytes of a row
    const bool every = list == nullptr, inside = chunk < CHUNKS;
    int count = D, begin = 0, rows = 0;  // a piece of this part's neurons: up to one for each thread

    const auto copy_row = [&](int i) {
        if (inside && i < rows) {
            const long long neuron = every ? part + (begin + i) * parts : neurons[i];
            const u32* const row = matrix + neuron * WORDS;
            Stage& stage = stages[i % STAGES];
            copy_words(&stage.words[own], row + 4 * chunk);
            copy_word(&stage.steps[own], row + step_at / 4);
            copy_word(&stage.lows[own], row + low_at / 4);
        }
        end_group();
    };
    const auto copy_first = [&] {
        rows = min(THREADS, (count - part + parts - 1) / parts - begin);
#pragma unroll 1
        for (int i = 0; i < STAGES - 1; i++) copy_row(i);
    };

    if (every) copy_first();
    wait_for_previous();  // in this order: `finish` reads what earlier kernels wrote before it waits
    start_next();
    float sums[32] = {}, steps = 0.0f, lows = 0.0f;
#pragma unroll 1
    for (; begin == 0 || part + begin * parts < count; begin += THREADS) {
        const int rank = min(part + (begin + own) * parts, D - 1);
        const float value = inner[rank];  // not set unless it is one of the first `count`, as an entry of the list
        if (!every) {
            neurons[own] = list[rank];
            count = *total;
        }
        __syncthreads();
        if (!every || begin > 0) copy_first();
        if (own < rows) {
            const long long neuron = every ? rank : neurons[own];
            const float* const units = reinterpret_cast<const float*>(matrix + neuron * WORDS) + UNITS_AT;
            scales[own] = float2{value * units[0], value * units[1]};
        }
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < rows; i++) {
            wait_for_groups<STAGES - 2>();  // row i has arrived
            copy_row(i + STAGES - 1);       // to where row i - 1 was
            const Stage& stage = stages[i % STAGES];
            const uint4 words = stage.words[own];
            const float2 scale = scales[i];
            const float step = scale.x * static_cast<float>(stage.steps[own] >> step_at % 4 * 8 & 0xFF);
            steps += step;
            lows = fmaf(scale.y, static_cast<float>(static_cast<signed char>(stage.lows[own] >> low_at % 4 * 8)), lows);
            const u32 of_chunk[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int s = 0; s < 4; s++) {  // both of a pair as float32, whose upper half is a bfloat16 number
                    const u32 two = pair(of_chunk[j], s, 0x43004300u);
                    float& even = sums[8 * j + 2 * s];
                    float& odd = sums[8 * j + 2 * s + 1];
                    even = fmaf(step, __uint_as_float(two << 16), even);
                    odd = fmaf(step, __uint_as_float(two), odd);
                }
            }
        }
        __syncthreads();
    }
    if (!inside) return;
    // An even column's sum is that of step · (128 + k), and an odd one's that of
    // step · (128 + k + (0x4300 + k') / 65536): its lowest bits are the other half of the pair, its neighbour's k'.
    const float even_rest = fmaf(-128.0f, steps, lows);
    const float odd_rest = fmaf(-(128.0f + (0x4300 - 128) / 65536.0f), steps, lows);
    float4* const to = partial + (static_cast<long long>(part) * CHUNKS + chunk) * 8;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float a = sums[4 * j], b = sums[4 * j + 2];
        to[j] = float4{a + even_rest, fmaf(-1.0f / 65536, a, sums[4 * j + 1]) + odd_rest,
                       b + even_rest, fmaf(-1.0f / 65536, b, sums[4 * j + 3]) + odd_rest};
    }
}
