// The neurons that masks keep, for the kernels of FFNs; placed before them.
//
// Defined before this file: N tokens (a power of two); WORDS of a mask; CANDIDATES (0: a mask per token).

constexpr int log2_above(int n) { return n > 1 ? 1 + log2_above((n + 1) / 2) : 0; }
constexpr int SEARCH = log2_above(WORDS);  // steps of a binary search among the words

// Writes this block's share of the neurons that any token keeps to `list` in shared memory, in order, and returns their
// number. An entry is neuron | tokens that keep it << 24. `mask_of` in shared memory gets each token's row of `masks`.
// The callers are THREADS threads, the first of which has a multiple of THREADS as its number, and `wait` is a barrier of
// these.
template <int THREADS, typename Wait>
__device__ __forceinline__ int find_neurons(const u32* masks, const float* values, const int* ids, int tokens,
                                            int (&mask_of)[N], u32* list, const Wait& wait) {
    constexpr int WARPS = THREADS / 32, WORDS_EACH = (WORDS + THREADS - 1) / THREADS;
    static_assert(CANDIDATES == 0 || N <= WARPS, "a warp finds the mask of a token");
    __shared__ u32 words[N][WORDS];
    __shared__ int ends[WORDS];  // number of set bits up to and including each word
    __shared__ int sums_of_warps[WARPS];
    const int thread = threadIdx.x % THREADS, lane = thread % 32, warp = thread / 32;
    if (CANDIDATES == 0) {
        if (thread < N) mask_of[thread] = thread;
    } else if (warp < tokens) {  // the id of the largest value, ties to the lowest id
        float best = -__int_as_float(0x7F800000);
        int id = 0x7FFFFFFF;
#pragma unroll 8
        for (int first = 0; first < CANDIDATES; first += 32) {  // loads of several rounds are on their way together
            const int i = min(first + lane, CANDIDATES - 1);
            const float value = values[warp * CANDIDATES + i];
            const int other = ids[warp * CANDIDATES + i];
            if (value > best || (value == best && other < id)) best = value, id = other;
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            const float value = __shfl_xor_sync(~0u, best, distance);
            const int other = __shfl_xor_sync(~0u, id, distance);
            if (value > best || (value == best && other < id)) best = value, id = other;
        }
        if (lane == 0) mask_of[warp] = id == 0x7FFFFFFF ? 0 : id;
    }
    wait();

    // Each thread counts the bits of a few words, then locates single bits.
    int counts[WORDS_EACH], count = 0;
#pragma unroll
    for (int i = 0; i < WORDS_EACH; i++) {
        const int word = thread * WORDS_EACH + i;
        u32 all = 0;
        if (word < WORDS) {
#pragma unroll
            for (int n = 0; n < N; n++) {
                const u32 own = n < tokens ? masks[static_cast<long long>(mask_of[n]) * WORDS + word] : 0;
                words[n][word] = own;
                all |= own;
            }
        }
        count += __popc(all);
        counts[i] = count;
    }
    int before = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, before, distance);
        if (lane >= distance) before += other;
    }
    if (lane == 31) sums_of_warps[warp] = before;
    wait();
    before -= count;
    int total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w == warp) before += total;
        total += sums_of_warps[w];
    }
#pragma unroll
    for (int i = 0; i < WORDS_EACH; i++)
        if (thread * WORDS_EACH + i < WORDS) ends[thread * WORDS_EACH + i] = before + counts[i];
    wait();
    const int first = static_cast<int>(blockIdx.x * static_cast<u32>(total) / gridDim.x);  // neurons × blocks < 2³²
    const int last = static_cast<int>((blockIdx.x + 1) * static_cast<u32>(total) / gridDim.x);
    for (int rank = first + thread; rank < last; rank += THREADS) {
        int word = 0, beyond = WORDS - 1;  // search for the first word whose bits end after this one
#pragma unroll
        for (int step = 0; step < SEARCH; step++) {
            const int middle = (word + beyond) / 2;
            if (ends[middle] > rank)
                beyond = middle;
            else
                word = min(middle + 1, beyond);
        }
        u32 all = 0;
#pragma unroll
        for (int n = 0; n < N; n++) all |= words[n][word];
        int place = 0, left = rank - (ends[word] - __popc(all));
#pragma unroll
        for (int width = 16; width > 0; width /= 2) {
            const int ones = __popc(all >> place & ((1u << width) - 1));
            if (left >= ones) left -= ones, place += width;
        }
        u32 keepers = 0;
#pragma unroll
        for (int n = 0; n < N; n++) keepers |= (words[n][word] >> place & 1) << n;
        list[rank - first] = word * 32 + place | keepers << 24;
    }
    wait();
    return last - first;
}

// The same for all threads of a block.
template <int THREADS>
__device__ __forceinline__ int find_neurons(const u32* masks, const float* values, const int* ids, int tokens,
                                            int (&mask_of)[N], u32* list) {
    return find_neurons<THREADS>(masks, values, ids, tokens, mask_of, list, [] { __syncthreads(); });
}
