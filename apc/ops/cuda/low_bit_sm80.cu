// Scores of neurons from a low-bit copy of their weights, on b1 tensor cores (Ampere to Hopper): AND-POPC of
// the weights' bits and the input's bits. The input is rounded to integers of 24 bits. A warp takes 16
// neurons, and its products cover the 24 = 3 · 8 bits of a token as columns.
//
// Defined before this file: WARPS of a block; N tokens (a power of two); E; D; BITS and PROJECTIONS of the copy; MASKS
// (else scores); HIDDEN (0 bfloat16, 1 float16, 2 float32); EARLY (programmatic dependent launch, on Hopper).

constexpr int PLANES = 24;
constexpr int ROW_WORDS = (E + 127) / 128 * 4;  // words of a packed row of E weights
constexpr int STEPS = (ROW_WORDS + 15) / 16;    // pieces of 64 bytes of a row
// Words of one bit of the input in shared memory; odd multiples of 16, so that neighbours are in different banks.
constexpr int PLANE_WORDS = 16 * (STEPS | 1);
constexpr int AHEAD = STEPS < 8 ? STEPS : 8;  // pieces loaded at a time
constexpr bool BOTH = BITS * PROJECTIONS == 2 && AHEAD == STEPS;  // whether a warp's weights are all loaded at once
constexpr int MASK_BYTES = (D + 127) / 128 * 16;
constexpr float LARGEST = 8388600.0f;  // the largest integer, below 2²³ by more than the quotient's rounding can add
constexpr int SIZE = HIDDEN == 2 ? 4 : 2;

// The transpose of the bit matrix whose rows are the lanes' words.
__device__ __forceinline__ u32 transpose(u32 x, int lane) {
    u32 low = 0x0000FFFF;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const u32 other = __shfl_xor_sync(~0u, x, step);
        x = lane & step ? (x & ~low) | (other >> step & low) : (x & low) | (other & low) << step;
        low ^= low << step / 2;
    }
    return x;
}

__device__ __forceinline__ void multiply(int (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
low_bit(const unsigned char* hidden,               // [tokens, E]; the previous kernel may have written it
        const uint4* __restrict__ planes,    // [BITS, PROJECTIONS, D, ROW_WORDS / 4]
        const float* __restrict__ scale,     // [PROJECTIONS, D]; slope and power likewise
        const float* __restrict__ slope, const float* __restrict__ power,
        const float* __restrict__ bias,      // [D]
        const float* __restrict__ threshold, // one number, read for masks
        float* __restrict__ scores,          // [tokens, D], out unless MASKS
        unsigned short* __restrict__ masks,  // [tokens, MASK_BYTES / 2], out if MASKS
        int tokens) {
    extern __shared__ __align__(16) u32 bits[];  // [N, PLANES, PLANE_WORDS]
    // [N, E], the input
    unsigned char* const given = reinterpret_cast<unsigned char*>(bits + N * PLANES * PLANE_WORDS);
    __shared__ float largest_of[N][WARPS];
    __shared__ long long total_of[N][WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quarter = lane % 4, row = lane / 4;
    const int first = (blockIdx.x * WARPS + warp) * 16;
    const int neurons[2] = {first + row, first + row + 8};

    uint4 held[BOTH ? 2 : 1][2][AHEAD];
    auto load = [&](uint4 (&held)[2][AHEAD], int plane, int step) {  // AHEAD pieces of both rows, from `step` on
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int at = 4 * (step + i) + quarter;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const bool there = at < ROW_WORDS / 4 && neurons[half] < D;
                held[half][i] = there ? planes[(static_cast<long long>(plane) * D + neurons[half]) * (ROW_WORDS / 4) + at] : uint4{0, 0, 0, 0};
            }
        }
    };
    load(held[0], 0, 0);
    if (BOTH) load(held[BOTH ? 1 : 0], 1, 0);
    float score[N][2], curve[PROJECTIONS][2][3];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const bool there = neurons[half] < D;
#pragma unroll
        for (int n = 0; n < N; n++) score[n][half] = there ? bias[neurons[half]] : 0.0f;
#pragma unroll
        for (int projection = 0; projection < PROJECTIONS; projection++) {
            const int at = projection * D + neurons[half];
            curve[projection][half][0] = there ? scale[at] : 0.0f;
            curve[projection][half][1] = there ? slope[at] : 0.0f;
            curve[projection][half][2] = there ? power[at] : 0.0f;
        }
    }
    const float least = MASKS ? *threshold : 0.0f;
    if (EARLY) {
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        asm volatile("griddepcontrol.wait;" ::: "memory");
    }

    const int bytes = tokens * E * SIZE;
    if (E * SIZE % 16 == 0) {
        for (int i = threadIdx.x; i < bytes / 16; i += 32 * WARPS) reinterpret_cast<uint4*>(given)[i] = reinterpret_cast<const uint4*>(hidden)[i];
    } else {
        for (int i = threadIdx.x; i < bytes; i += 32 * WARPS) given[i] = hidden[i];
    }
    __syncthreads();
    float largest[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
        float found = 0.0f;
        if (n < tokens)
            for (int e = threadIdx.x; e < E; e += 32 * WARPS) found = fmaxf(found, fabsf(number(given, n * E + e)));
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) found = fmaxf(found, __shfl_xor_sync(~0u, found, distance));
        if (lane == 0) largest_of[n][warp] = found;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; n++) {
        largest[n] = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) largest[n] = fmaxf(largest[n], largest_of[n][w]);
        if (!(largest[n] > 0.0f)) largest[n] = 1.0f;
        const float scaled = LARGEST / largest[n];
        long long total = 0;
#pragma unroll 4
        for (int word = warp; word < 16 * STEPS; word += WARPS) {
            const int e = 32 * word + lane;
            const int whole = n < tokens && e < E ? __float2int_rn(number(given, n * E + e) * scaled) : 0;
            total += whole;
            const u32 plane = transpose(static_cast<u32>(whole), lane);
            if (lane < PLANES) bits[(n * PLANES + lane) * PLANE_WORDS + word] = plane;
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
        if (lane == 0) total_of[n][warp] = total;
    }
    __syncthreads();

#pragma unroll (BITS == 1 ? PROJECTIONS : 1)
    for (int projection = 0; projection < PROJECTIONS; projection++) {
        long long level_sums[N][2] = {};
#pragma unroll (BOTH ? BITS : 1)
        for (int bit = 0; bit < BITS; bit++) {
            uint4(&own)[2][AHEAD] = held[BOTH ? bit * PROJECTIONS + projection : 0];
            int sums[N][PLANES / 8][4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; step += AHEAD) {
                if (!BOTH && projection + bit + step > 0) load(own, bit * PROJECTIONS + projection, step);
#pragma unroll
                for (int i = 0; i < AHEAD; i++) {
                    if (step + i >= STEPS) break;
                    const uint4 a = own[0][i], b = own[1][i];
#pragma unroll
                    for (int n = 0; n < N; n++) {
#pragma unroll
                        for (int tile = 0; tile < PLANES / 8; tile++) {
                            const uint4 c = *reinterpret_cast<const uint4*>(bits + (n * PLANES + 8 * tile + row) * PLANE_WORDS + 16 * (step + i) + 4 * quarter);
                            multiply(sums[n][tile], a.x, b.x, a.y, b.y, c.x, c.y);
                            multiply(sums[n][tile], a.z, b.z, a.w, b.w, c.z, c.w);
                        }
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    // The columns' counts times 2^column. The highest bit counts negative (two's complement).
                    long long sum = 0;
#pragma unroll
                    for (int tile = 0; tile < PLANES / 8; tile++) {
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            const int column = 8 * tile + 2 * quarter + j;
                            const long long part = static_cast<long long>(sums[n][tile][2 * half + j]) << column;
                            sum += column == PLANES - 1 ? -part : part;
                        }
                    }
                    level_sums[n][half] += sum << bit;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            long long total = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) total += total_of[n][w];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                long long sum = level_sums[n][half];
#pragma unroll
                for (int distance = 1; distance < 4; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
                if (neurons[half] < D) {  // a level is (2 · bits − 2^BITS + 1) / 2
                    const float* const of = curve[projection][half];
                    const float product = static_cast<float>(2 * sum - ((1 << BITS) - 1) * total) * (0.5f * largest[n] / LARGEST);
                    const float z = of[0] * product;
                    score[n][half] += of[1] * z + of[2] * logf(1.0f + z * z);
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (n >= tokens) break;
        if (MASKS) {
            u32 mask = 0;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 kept = __ballot_sync(~0u, neurons[half] < D && score[n][half] >= least);
#pragma unroll
                for (int i = 0; i < 8; i++) mask |= (kept >> 4 * i & 1) << (8 * half + i);
            }
            if (lane == 0 && first < 8 * MASK_BYTES) masks[n * (MASK_BYTES / 2) + first / 16] = static_cast<unsigned short>(mask);
        } else if (quarter == 0) {
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (neurons[half] < D) scores[static_cast<long long>(n) * D + neurons[half]] = score[n][half];
        }
    }
}
