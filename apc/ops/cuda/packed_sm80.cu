// The product of a vector with all rows of a packed matrix; `packed_sm80.cuh` is placed before it.
//
// On Hopper a warp that copies rows has time to list the neurons of a later FFN besides. Defined before this file for
// that: what `find_neurons_sm80.cuh` needs; MOST, the most neurons of a block. CANDIDATES = 0: no list.

// output = input · rowsᵀ + bias + residual, of the model's type. The input is x + added, or its RMS norm. A block takes
// every `gridDim.x`-th tile of 16 rows.
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)
project(const uint4* x,                        // [E]
        const uint4* added,                    // [E] or null
        const uint4* __restrict__ norm,        // [E] or null
        uint4* total,                          // [E], out, unless `added` is null: x + added
        const u32* __restrict__ matrix,        // packed [R, ROW_WORDS]
        const float* __restrict__ bias,        // [R] or null
        const unsigned short* residual,        // [R] or null
        unsigned short* output,                // [R], out
        const u32* __restrict__ masks,         // [K, WORDS]
        const float* values, const int* ids,   // [CANDIDATES], for the mask
        int* listed,                           // [blocks, 2 + MOST], out: how many neurons, which mask, the neurons
        int R, float epsilon) {
    extern __shared__ __align__(16) u32 memory[];
    Input& input = *reinterpret_cast<Input*>(memory + TEAMS * SLOTS * SLOT);
    __shared__ float parts[TEAMS][TEAM_WARPS][2 * ROWS];
    __shared__ Ring rings[TEAMS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = own_team();
    Ring& ring = rings[team];
    u32* const slots = memory + team * SLOTS * SLOT;
    // This team's tiles are those of the block with numbers team, team + TEAMS, …
    const int first_tile = team * gridDim.x + blockIdx.x, step = TEAMS * gridDim.x, tiles = (R + 2 * ROWS - 1) / (2 * ROWS);
    const int own = (max(tiles - first_tile, 0) + step - 1) / step;

    const auto row_of_slot = [&](int s) { return (first_tile + s / 2 * step) * (2 * ROWS) + s % 2 * ROWS; };
    const auto copy = [&](int s) {  // two slots of a tile
        const int first = row_of_slot(s);
        copy_rows<ROWS, ROW_WORDS>(ring, s, slots + s % SLOTS * SLOT, STRIDE, [&](int i) {
            return first + i < R ? matrix + static_cast<long long>(first + i) * ROW_WORDS : nullptr;
        });
    };

    make_rings(rings);
    if (copies_rows()) copy_slots(ring, 0, HOPPER ? 2 * own : SLOTS, copy);
    if (threadIdx.x >= THREADS) {
        if (CANDIDATES > 0 && team == 0) {
            __shared__ u32 list[MOST];
            __shared__ int mask_of[N];
            wait_for_previous();
            const int neurons = find_neurons<32>(masks, values, ids, 1, mask_of, list, [] { __syncwarp(); });
            int* const to = listed + blockIdx.x * (2 + MOST);
            if (lane == 0) to[0] = neurons, to[1] = mask_of[0];
            for (int i = lane; i < neurons; i += 32) to[2 + i] = list[i];
        }
        return;
    }
    const Norm weights = load_norm(norm);
    wait_for_previous();
    start_next();  // in this order: later kernels read what earlier ones wrote before they wait
    uint4* const sums = added != nullptr && blockIdx.x == 0 ? total : nullptr;
    set_input(input, load_pieces(x, added), norm != nullptr, weights, epsilon, sums, false);
    wait_for_warps();  // the input is set
#pragma unroll 1
    for (int s = 0; s < 2 * own; s += 2) {
        const int first = row_of_slot(s), row = first + lane;
        const bool writes = warp % TEAM_WARPS == 0 && lane < 2 * ROWS && row < R;
        const float more = writes && bias != nullptr ? bias[row] : 0.0f;
        const float before = writes && residual != nullptr ? widen(residual[row]).x : 0.0f;
        wait_for_slot<SLOTS - 1>(ring, s);
        if (first + ROWS < R) wait_for_slot<SLOTS - 2>(ring, s + 1);
        wait_for_team(team);  // both slots have arrived
        multiply_slots(slots + s % SLOTS * SLOT, slots + (s + 1) % SLOTS * SLOT, input, parts[team]);
        wait_for_team(team);  // all warps have read them
        replace_slot(ring, s, copy);
        replace_slot(ring, s + 1, copy);
        if (warp % TEAM_WARPS == 0) {
            float y = sum_of_parts(parts[team]) + more;
            if (residual != nullptr) y = round_half(y) + before;
            if (writes) output[row] = half_of(y);
        }
    }
}
