// Sums of levels times inputs, of a low-bit copy stored by input, at the inputs that take part (Ampere to Hopper).
//
// A block takes 64 words of 32 neurons of one projection, and a share of one token's inputs. It lists those that take
// part, and its four groups of 64 threads read the copy at every fourth of them; each thread adds up one word. A level's
// bits become the upper bits of a float's mantissa, so that a neuron costs three instructions.
//
// Defined before this file: BITS, PROJECTIONS; E; WORDS of a row; SHARE, inputs of a block, at most 256; GROUPS, spacings
// of a row of one input (0: none); WORDS_PER_GROUP; HIDDEN (0 bfloat16, 1 float16, 2 float32); EARLY (programmatic
// dependent launch, on Hopper).

constexpr int THREADS = 256, BLOCK_WORDS = 64, TEAMS = THREADS / BLOCK_WORDS;
constexpr int AHEAD = 4;  // inputs whose words a thread loads at a time
constexpr int PITCH = 33;  // of a word's 32 sums in shared memory, so that neighbours are in different banks
static_assert(SHARE <= THREADS && BITS <= 4, "a thread looks at one input; a level fills a nibble");

__device__ __forceinline__ float number(const void* given, long long at) {
    if (HIDDEN == 2) return static_cast<const float*>(given)[at];
    const unsigned short half = static_cast<const unsigned short*>(given)[at];
    if (HIDDEN == 0) return __uint_as_float(static_cast<u32>(half) << 16);
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(half));
    return result;
}

extern "C" __global__ void __launch_bounds__(THREADS)
copy_sums(const void* hidden,                              // [tokens, E]; the previous kernel may have written it
          const u32* __restrict__ planes,                  // [BITS, PROJECTIONS, E, WORDS]
          const unsigned short* __restrict__ spacings,     // bfloat16 [PROJECTIONS, E, GROUPS], read if there are any
          const float* __restrict__ norms,                 // [E]
          const float* __restrict__ least,                 // one number
          float* __restrict__ sums,                        // [shares, tokens, PROJECTIONS, 32 · WORDS], out
          int tokens) {
    __shared__ int taken[SHARE], counts[THREADS / 32];
    __shared__ float values[SHARE], added[TEAMS][BLOCK_WORDS * PITCH];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int projection = blockIdx.x % PROJECTIONS, first_word = blockIdx.x / PROJECTIONS * BLOCK_WORDS;
    const int token = blockIdx.y % tokens, share = blockIdx.y / tokens, e = share * SHARE + thread;
    const bool mine = thread < SHARE && e < E;
    const float norm = mine ? norms[e] : 0.0f, at_least = *least;
    if (EARLY) {
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
        asm volatile("griddepcontrol.wait;" ::: "memory");
    }
    const float x = mine ? number(hidden, static_cast<long long>(token) * E + e) : 0.0f;
    const bool takes_part = mine && fabsf(x) * norm >= at_least;  // NaN does not
    const u32 vote = __ballot_sync(~0u, takes_part);
    if (lane == 0) counts[warp] = __popc(vote);
    __syncthreads();
    int before = __popc(vote & ((1u << lane) - 1)), count = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) {
        if (w < warp) before += counts[w];
        count += counts[w];
    }
    if (takes_part) taken[before] = e, values[before] = x;
    __syncthreads();

    const int team = thread / BLOCK_WORDS, word = first_word + thread % BLOCK_WORDS;
    float found[32] = {}, total = 0.0f;
    for (int start = team; word < WORDS && start < count; start += TEAMS * AHEAD) {
        u32 words[AHEAD][BITS];
        float factors[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int at = start + i * TEAMS;
            const bool there = at < count;
            const long long row = static_cast<long long>(projection) * E + (there ? taken[at] : 0);
            factors[i] = there ? values[at] : 0.0f;
            if (GROUPS > 0 && there) factors[i] *= __uint_as_float(static_cast<u32>(spacings[row * GROUPS + word / WORDS_PER_GROUP]) << 16);
#pragma unroll
            for (int bit = 0; bit < BITS; bit++)
                words[i][bit] = there ? __ldcs(planes + (static_cast<long long>(bit) * PROJECTIONS * E + row) * WORDS + word) : 0;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const float scaled = factors[i] * (1 << BITS);
            total += factors[i];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                u32 nibbles = words[i][0] >> k & 0x11111111u;
#pragma unroll
                for (int bit = 1; bit < BITS; bit++) nibbles |= (words[i][bit] >> k & 0x11111111u) << bit;
#pragma unroll
                for (int m = 0; m < 8; m++) {  // 1 + level / 2^BITS
                    const int shift = 4 * m - (23 - BITS);
                    const u32 upper = (shift < 0 ? nibbles << -shift : nibbles >> shift) & ((1u << BITS) - 1) << (23 - BITS);
                    found[k + 4 * m] = fmaf(scaled, __uint_as_float(upper | 0x3F800000u), found[k + 4 * m]);
                }
            }
        }
    }
    // A level is index − (2^BITS − 1) / 2, and the sums hold index + 2^BITS.
    const float excess = total * ((1 << BITS) + 0.5f * ((1 << BITS) - 1));
#pragma unroll
    for (int i = 0; i < 32; i++) added[team][thread % BLOCK_WORDS * PITCH + i] = found[i] - excess;
    __syncthreads();
    float* const to = sums + ((static_cast<long long>(share) * tokens + token) * PROJECTIONS + projection) * 32 * WORDS;
    for (int i = thread; i < 32 * BLOCK_WORDS && 32 * first_word + i < 32 * WORDS; i += THREADS) {
        const int at = i / 32 * PITCH + i % 32;
        float sum = 0.0f;
#pragma unroll
        for (int t = 0; t < TEAMS; t++) sum += added[t][at];
        to[32 * first_word + i] = sum;
    }
}
