// A gated FFN of 4 bits for one token, over the neurons that a mask keeps; `packed_sm80.cuh` is placed before it.
//
// A block takes its share of the neurons, 8 at a time: a tile. A tile has three slots of the ring: rows of gate, of up
// and of down. The rows of gate and up are one product. Its sums become the neurons' values, which every warp of a team
// computes. Then each thread adds rows of down times these values to its own columns: a chunk, for some of the rows.
//
// Other rows come before the tiles: those of a later predictor's bottleneck, four of 8 bits in a slot, and gate and up of
// spared neurons, two of 16 bits. They need no mask, so memory is busy while the block finds its neurons.
//
// Defined before this file, besides what `packed_sm80.cuh` and `find_neurons_sm80.cuh` need: D; MOST, the most neurons
// of a block. CANDIDATES = 0 means all neurons here, and no masks.

constexpr int COLUMN_THREADS = (CHUNKS + 31) / 32 * 32;  // that have a chunk of columns each, for a share of the rows
constexpr int MOST_SHARES = TEAM_THREADS / COLUMN_THREADS, SHARES = MOST_SHARES >= 4 ? 4 : MOST_SHARES >= 2 ? 2 : 1;
constexpr int FULL_WORDS = E / 2, BYTE_WORDS = E / 4;  // of a row of 16 bits, and of 8
static_assert(COLUMN_THREADS <= TEAM_THREADS, "a thread has one chunk of columns");
static_assert(2 * FULL_WORDS <= SLOT, "a slot has room for two rows of 16 bits, or four of 8");
static_assert((TEAMS * SHARES - 1) * E <= TEAMS * SLOTS * SLOT, "the rings have room for the shares' sums");

// Byte i of a word, less 128.
__device__ __forceinline__ float byte_weight(u32 word, int i) {
    return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7650 + i)) - 8388736.0f;  // 2²³ + byte as a float
}

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)
ffn(const uint4* x,                           // [E]
    const uint4* __restrict__ norm,           // [E] or null: x is the input itself
    const u32* __restrict__ gate,             // packed [D, ROW_WORDS]
    const u32* __restrict__ up,               // packed [D, ROW_WORDS]
    const u32* __restrict__ down,             // packed [D, ROW_WORDS], transposed
    const u32* __restrict__ masks,            // [K, WORDS]
    const float* values, const int* ids,      // [CANDIDATES], for the mask
    const int* listed,                        // as `project` writes it, before the previous kernel began; or null
    float4* partial,                          // [blocks, E], out
    const int* __restrict__ spared,           // [P], neurons with 16 bits
    const u32* __restrict__ spared_gate,      // [P, E]
    const u32* __restrict__ spared_up,        // [P, E]
    float* spared_inner,                      // [P], out: their values, 0 for those that the mask drops
    const u32* __restrict__ later,            // bytes [H, E], 128 more than the weights over `later_scales`
    const float* __restrict__ later_scales,   // [H]
    const float* __restrict__ later_bias,     // [H]
    float* later_inner,                       // [H], out: SiLU(rms_norm(input) · laterᵀ + bias)
    int P, int H, float epsilon, float later_epsilon) {
    extern __shared__ __align__(16) u32 memory[];
    Input& input = *reinterpret_cast<Input*>(memory + TEAMS * SLOTS * SLOT);
    u32* const list = reinterpret_cast<u32*>(&input + 1);  // [MOST]
    __shared__ float parts[TEAMS][TEAM_WARPS][2 * ROWS];
    __shared__ int mask_of[N];
    __shared__ Ring rings[TEAMS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = own_team(), thread = threadIdx.x % TEAM_THREADS;
    const int block = blockIdx.x, blocks = gridDim.x, other = blocks - 1 - block;
    Ring& ring = rings[team];
    u32* const slots = memory + team * SLOTS * SLOT;
    // This block's slots before the tiles: every `blocks`-th of the later rows', then of the spared neurons'. The team has
    // those with numbers team, team + TEAMS, …, and of the tiles, which go on in turn, those from `first_tile` on.
    const int later_slots = ((H + 3) / 4 + other) / blocks, slots_before = later_slots + (P + block) / blocks;
    const int before = (slots_before - team + TEAMS - 1) / TEAMS, first_tile = (team + slots_before) % TEAMS;
    const int begin = static_cast<int>(static_cast<long long>(block) * D / blocks);  // of all neurons
    int own = static_cast<int>(static_cast<long long>(block + 1) * D / blocks) - begin;

    const auto copy = [&](int s) {
        u32* const slot = slots + s % SLOTS * SLOT;
        if (s < before) {
            const int place = s * TEAMS + team, first = 4 * (place * blocks + block);
            const long long which = (place - later_slots) * blocks + other;
            if (place < later_slots)
                copy_rows<4, BYTE_WORDS>(ring, s, slot, BYTE_WORDS, [&](int i) -> const u32* {
                    return first + i < H ? later + static_cast<long long>(first + i) * BYTE_WORDS : nullptr;
                });
            else
                copy_rows<2, FULL_WORDS>(ring, s, slot, FULL_WORDS, [&](int i) -> const u32* {
                    return (i ? spared_up : spared_gate) + which * FULL_WORDS;
                });
        } else {
            const int first = ((s - before) / 3 * TEAMS + first_tile) * ROWS, kind = (s - before) % 3;
            const u32* const matrix = kind == 0 ? gate : kind == 1 ? up : down;
            copy_rows<ROWS, ROW_WORDS>(ring, s, slot, STRIDE, [&](int i) -> const u32* {
                if (first + i >= own) return nullptr;
                const long long neuron = CANDIDATES == 0 ? begin + first + i : list[first + i] & 0xFFFFFF;
                return matrix + neuron * ROW_WORDS;
            });
        }
    };

    make_rings(rings);
    int copied = 0;
    if (CANDIDATES > 0) {
        copied = min(before, SLOTS);
        if (copies_rows()) copy_slots(ring, 0, copied, copy);
        if (listed != nullptr) {
            const int* const given = listed + block * (2 + MOST);
            for (int i = threadIdx.x; i < MOST; i += ALL_THREADS) list[i] = given[2 + i];
            own = given[0];
            if (threadIdx.x == 0) mask_of[0] = given[1];
            __syncthreads();
        } else {
            wait_for_previous();
            own = find_neurons<ALL_THREADS>(masks, values, ids, 1, mask_of, list);
        }
    }
    const int tiles = max((own + ROWS - 1) / ROWS - first_tile + TEAMS - 1, 0) / TEAMS;
    if (copies_rows()) copy_slots(ring, copied, HOPPER ? before + 3 * tiles : SLOTS, copy);
    if (threadIdx.x >= THREADS) return;
    if (CANDIDATES == 0 || listed != nullptr) wait_for_previous();
    start_next();  // in this order: `finish` reads what earlier kernels wrote before it waits
    const Norm weights = load_norm(norm);
    const Pieces pieces = load_pieces(x, nullptr);
    const float squares = set_input(input, pieces, norm != nullptr, weights, epsilon, nullptr, H > 0);
    wait_for_warps();  // the input is set

#pragma unroll 1
    for (int s = 0; s < before; s++) {
        const int place = s * TEAMS + team;
        const bool is_later = place < later_slots;
        wait_for_slot<SLOTS - 1>(ring, s);
        if (!HOPPER) wait_for_team(team);  // the slot has arrived
        const u32* const slot = slots + s % SLOTS * SLOT;
        float products[4] = {};
#pragma unroll 1
        for (int i = thread; i < E / 8; i += TEAM_THREADS) {
            float x[8];
            widen8(input.values[i], x);
            if (is_later) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const uint2 bytes = *reinterpret_cast<const uint2*>(slot + r * BYTE_WORDS + 2 * i);
#pragma unroll
                    for (int j = 0; j < 8; j++) products[r] = fmaf(byte_weight(j < 4 ? bytes.x : bytes.y, j % 4), x[j], products[r]);
                }
            } else {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float w[8];
                    widen8(*reinterpret_cast<const uint4*>(slot + r * FULL_WORDS + 4 * i), w);
#pragma unroll
                    for (int j = 0; j < 8; j++) products[r] = fmaf(w[j], x[j], products[r]);
                }
            }
        }
        float(&own_parts)[TEAM_WARPS][2 * ROWS] = parts[team];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float sum = sum_of_warp(products[r]);
            if (lane == 0) own_parts[warp % TEAM_WARPS][r] = sum;
        }
        wait_for_team(team);  // all warps have read the slot
        replace_slot(ring, s, copy);
        float sum = 0.0f;
        if (thread < 32) {
#pragma unroll
            for (int w = 0; w < TEAM_WARPS; w++) sum += own_parts[w][lane % 4];
        }
        if (is_later) {
            const int h = 4 * (place * blocks + block) + thread;
            if (thread < 4 && h < H) {
                const float y = sum * later_scales[h] / sqrtf(squares / E + later_epsilon) + later_bias[h];
                later_inner[h] = y / (1.0f + expf(-y));
            }
        } else if (thread < 32) {
            const float of_up = __shfl_sync(~0u, sum, 1);
            const int which = (place - later_slots) * blocks + other, neuron = spared[which];
            const u32* const mask = masks + static_cast<long long>(mask_of[0]) * WORDS;
            const bool kept = CANDIDATES == 0 || (mask[neuron / 32] >> neuron % 32 & 1);
            if (lane == 0) spared_inner[which] = kept ? round_half(activate(sum) * of_up) : 0.0f;
        }
        wait_for_team(team);  // the parts have been read
    }

    const int share = thread / COLUMN_THREADS, chunk = thread % COLUMN_THREADS;
    const bool adds = share < SHARES && chunk < CHUNKS;
    float columns[32] = {}, steps = 0.0f, lows = 0.0f;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        const int s = before + 3 * tile, first = (tile * TEAMS + first_tile) * ROWS;
        const u32* const rows = slots + (s + 2) % SLOTS * SLOT;
        wait_for_slot<SLOTS - 1>(ring, s);
        wait_for_slot<SLOTS - 2>(ring, s + 1);
        if (!HOPPER) wait_for_team(team);  // gate and up have arrived
        multiply_slots(slots + s % SLOTS * SLOT, slots + (s + 1) % SLOTS * SLOT, input, parts[team]);
        wait_for_slot<SLOTS - 3>(ring, s + 2);
        wait_for_team(team);  // down has arrived, and all warps have read gate and up
        replace_slot(ring, s, copy);
        replace_slot(ring, s + 1, copy);
        // Lane i has the value of neuron i % 8, as shares of its row of down's units.
        const float sum = sum_of_parts(parts[team]), pair_sum = __shfl_xor_sync(~0u, sum, ROWS);
        const bool of_up = lane & ROWS;
        const float value = round_half(activate(of_up ? pair_sum : sum) * (of_up ? sum : pair_sum));
        const bool read = first + lane % ROWS < own;
        const float* const units = reinterpret_cast<const float*>(rows + lane % ROWS * STRIDE + UNITS_AT);
        const float step_scale = read ? value * units[0] : 0.0f, low_scale = read ? value * units[1] : 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS / SHARES; r++) {
            const int row = r * SHARES + share % SHARES;
            const float of_steps = __shfl_sync(~0u, step_scale, row), of_lows = __shfl_sync(~0u, low_scale, row);
            if (!adds) continue;
            const u32* const given = rows + row * STRIDE;
            const unsigned char* const levels = reinterpret_cast<const unsigned char*>(given) + E / 2 + chunk / PER_GROUP;
            const uint4 chunk_words = *reinterpret_cast<const uint4*>(given + 4 * chunk);
            const float step = of_steps * static_cast<float>(levels[0]);
            steps += step;
            lows = fmaf(of_lows, static_cast<float>(static_cast<signed char>(levels[GROUPS])), lows);
            const u32 of_chunk[4] = {chunk_words.x, chunk_words.y, chunk_words.z, chunk_words.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int k = 0; k < 4; k++) {  // both of a pair as float32, whose upper half is a bfloat16 number
                    const u32 two = pair(of_chunk[j], k, 0x43004300u);
                    float& even = columns[8 * j + 2 * k];
                    float& odd = columns[8 * j + 2 * k + 1];
                    even = fmaf(step, __uint_as_float(two << 16), even);
                    odd = fmaf(step, __uint_as_float(two), odd);
                }
            }
        }
        wait_for_team(team);  // all warps have read down, and the parts
        replace_slot(ring, s + 2, copy);
    }

    // An even column's sum is that of step · (128 + k), and an odd one's that of
    // step · (128 + k + (0x4300 + k') / 65536): its lowest bits are the other half of the pair, its neighbour's k'.
    const float even_rest = fmaf(-128.0f, steps, lows);
    const float odd_rest = fmaf(-(128.0f + (0x4300 - 128) / 65536.0f), steps, lows);
    float4 result[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float a = columns[4 * j], b = columns[4 * j + 2];
        result[j] = float4{a + even_rest, fmaf(-1.0f / 65536, a, columns[4 * j + 1]) + odd_rest,
                           b + even_rest, fmaf(-1.0f / 65536, b, columns[4 * j + 3]) + odd_rest};
    }
    if (!HOPPER) wait_for_groups<0>();
    wait_for_warps();  // the ring is free for the sums of all shares but the first
    float4* const sums = reinterpret_cast<float4*>(memory);
    const int place = team * SHARES + share;
    if (adds && place > 0)
#pragma unroll
        for (int j = 0; j < 8; j++) sums[((place - 1) * 8 + j) * CHUNKS + chunk] = result[j];
    wait_for_warps();
    if (!adds || place > 0) return;
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int p = 0; p < TEAMS * SHARES - 1; p++) {
            const float4 more = sums[(p * 8 + j) * CHUNKS + chunk];
            result[j].x += more.x, result[j].y += more.y, result[j].z += more.z, result[j].w += more.w;
        }
        partial[(static_cast<long long>(block) * CHUNKS + chunk) * 8 + j] = result[j];
    }
}
