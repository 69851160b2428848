// Sums of levels times inputs, of a low-bit copy stored by input, at the inputs that take part, on tensor cores (Ampere to
// Hopper).
//
// A block takes 32 words of 32 neurons of one projection, and a share of one token's inputs. It lists those that take
// part. A warp multiplies 8 words by every other 16 inputs of the list. Rows of a product are neurons: the bits of a level
// become the upper bits of a bfloat16 mantissa, 1 + level / 16. Its 8 columns are the inputs times the spacings of the 4
// groups that the words belong to, each as a sum of two bfloat16 numbers.
//
// Defined before this file: BITS, PROJECTIONS; E; WORDS of a row; SHARE, inputs of a block; GROUPS, spacings of a row, one
// for two words (0: none); HIDDEN (0 bfloat16, 1 float16, 2 float32); EARLY (programmatic dependent launch, on Hopper).

constexpr int THREADS = 256, WARPS = THREADS / 32, TILE = 8, TILES = 4, PARTS = WARPS / TILES;
constexpr int ROUNDS = (SHARE + THREADS - 1) / THREADS;
static_assert(BITS <= 4 && 1ll * BITS * PROJECTIONS * E * WORDS < 1ll << 31, "a level fills a nibble; an int holds a word's place");

// Two numbers as bfloat16, the first in the lower half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// What is left of a number after rounding it to bfloat16.
__device__ __forceinline__ float rest(float x) { return x - __uint_as_float(pack(0.0f, x) & 0xFFFF0000u); }

__device__ __forceinline__ void multiply(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
copy_sums(const void* hidden,                           // [tokens, E]; the previous kernel may have written it
          const u32* __restrict__ planes,               // [BITS, PROJECTIONS, E, WORDS]
          const unsigned short* __restrict__ spacings,  // bfloat16 [PROJECTIONS, E, GROUPS], read if there are any
          const float* __restrict__ norms,              // [E]
          const float* __restrict__ least,              // one number
          float4* __restrict__ sums,                    // [shares, PARTS, tokens, PROJECTIONS, 8 · WORDS], out
          int tokens) {
    __shared__ int taken[ROUNDS * THREADS], counts[ROUNDS * WARPS];
    __shared__ float values[ROUNDS * THREADS];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, row = lane / 4, quarter = lane % 4;
    const int projection = blockIdx.x % PROJECTIONS, token = blockIdx.y % tokens, share = blockIdx.y / tokens;
    float norm[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int own = i * THREADS + thread, e = share * SHARE + own;
        norm[i] = own < SHARE && e < E ? norms[e] : -1.0f;
    }
    const float at_least = *least;
    if (EARLY) {
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        asm volatile("griddepcontrol.wait;" ::: "memory");
    }
    float x[ROUNDS];
    u32 votes[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int e = share * SHARE + i * THREADS + thread;
        x[i] = norm[i] >= 0.0f ? number(hidden, static_cast<long long>(token) * E + e) : 0.0f;
        votes[i] = __ballot_sync(~0u, norm[i] >= 0.0f && fabsf(x[i]) * norm[i] >= at_least);  // NaN takes no part
        if (lane == 0) counts[i * WARPS + warp] = __popc(votes[i]);
    }
    __syncthreads();
    int count = 0;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        int before = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (w == warp) before = count + __popc(votes[i] & ((1u << lane) - 1));
            count += counts[i * WARPS + w];
        }
        if (votes[i] >> lane & 1) taken[before] = share * SHARE + i * THREADS + thread, values[before] = x[i];
    }
    __syncthreads();

    const int part = warp / TILES, first_word = (blockIdx.x / PROJECTIONS * TILES + warp % TILES) * TILE, word = first_word + row;
    const bool second = row % 2;  // whether this lane's column holds the second of a pair of numbers
    // The words of the inputs at place, place + 1, place + 8 and place + 9 of the list, and their columns.
    auto load = [&](int place, u32 (&words)[4][BITS], float (&columns)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = place + 2 * quarter + i % 2 + i / 2 * 8;
            const bool there = at < count;
            const int input = projection * E + (there ? taken[at] : 0);
            columns[i] = there ? values[at] : 0.0f;
            if (GROUPS > 0) {
                const int group = first_word / 2 + row / 2;
                columns[i] *= there && group < GROUPS ? __uint_as_float(static_cast<u32>(spacings[input * GROUPS + group]) << 16) : 0.0f;
            }
#pragma unroll
            for (int bit = 0; bit < BITS; bit++)
                words[i][bit] = there && word < WORDS ? __ldcs(planes + (bit * PROJECTIONS * E + input) * WORDS + word) : 0;
        }
    };
    float found[4][4][4] = {}, totals[4] = {};
    u32 words[4][BITS], next_words[4][BITS];
    float columns[4], next_columns[4];
    load(16 * part, words, columns);
    for (int place = 16 * part; place < count; place += 16 * PARTS) {
        load(place + 16 * PARTS, next_words, next_columns);
#pragma unroll
        for (int i = 0; i < 4; i++) columns[i] = second ? rest(columns[i]) : columns[i];
        const u32 b0 = pack(columns[0], columns[1]), b1 = pack(columns[2], columns[3]), one = 0x3F803F80u;
        multiply(totals, one, one, one, one, b0, b1);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 nibbles[4], pairs[2][2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                nibbles[i] = words[i][0] >> k & 0x11111111u;
#pragma unroll
                for (int bit = 1; bit < BITS; bit++)
                    nibbles[i] |= (bit > k ? words[i][bit] << (bit - k) : words[i][bit] >> (k - bit)) & 0x11111111u << bit;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                pairs[i][0] = __byte_perm(nibbles[2 * i], nibbles[2 * i + 1], 0x5410);
                pairs[i][1] = __byte_perm(nibbles[2 * i], nibbles[2 * i + 1], 0x7632);
            }
#pragma unroll
            for (int m = 0; m < 4; m++) {
                auto level = [&](u32 pair) { return ((m == 0 ? pair << 3 : pair >> (4 * m - 3)) & 0x00780078u) | one; };
                multiply(found[k][m], level(pairs[0][0]), level(pairs[0][1]), level(pairs[1][0]), level(pairs[1][1]), b0, b1);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            columns[i] = next_columns[i];
#pragma unroll
            for (int bit = 0; bit < BITS; bit++) words[i][bit] = next_words[i][bit];
        }
    }
    // Of its row's word, the lane that holds the columns of the word's group has the sums.
    if (quarter != row / 2 || word >= WORDS) return;
    const float excess = (totals[0] + totals[1]) * (16.0f + 0.5f * ((1 << BITS) - 1));
    float4* const to = sums + (((static_cast<long long>(share) * PARTS + part) * tokens + token) * PROJECTIONS + projection) * 8 * WORDS + 8 * word;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
            float of_bit[4];
#pragma unroll
            for (int k = 0; k < 4; k++) of_bit[k] = 16.0f * (found[k][m][2 * half] + found[k][m][2 * half + 1]) - excess;
            to[4 * half + m] = float4{of_bit[0], of_bit[1], of_bit[2], of_bit[3]};
        }
    }
}
