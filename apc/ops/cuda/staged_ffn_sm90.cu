// A gated FFN in stages, for one token on Hopper: of the neurons that a mask keeps, those whose gate is large enough
// have their row of up read, and of these those whose product is large enough their row of down.
//
// There is one block per multiprocessor. Each of its warps takes every eighth of the block's neurons, and holds three
// rows in shared memory: one of gate, one of up and one of down, of three successive neurons. A row is fetched as soon
// as the row before it shows that it is needed, and arrives while the warp multiplies two others. So warps never wait
// for each other until they add up their sums. Sums are float32 and their order is fixed.
//
// Defined before this file: what `find_neurons_sm80.cuh` and `values_sm80.cuh` need, with N = 1; E; MOST, the most neurons of a block; UP_PART, whether
// `up_part` is added to the first threshold's score.

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int CHUNKS = E / 8;                // chunks of 16 bytes of a row
constexpr int OWN = (CHUNKS + 31) / 32;      // chunks of a row that a lane takes
constexpr int ROW_BYTES = 2 * E, HELD_BYTES = 3 * ROW_BYTES;
static_assert(N == 1 && E % 8 == 0, "one token; rows are copied in pieces of 16 bytes");

// With more registers than these, no block of the kernel that adds up the parts would fit beside a block of this one.
extern "C" __global__ void __maxnreg__(184)
staged(const uint4* hidden,                      // [E]
       const unsigned char* __restrict__ gate,   // [D, E], rows `gate_bytes` apart
       const unsigned char* __restrict__ up,     // [D, E], rows `up_bytes` apart
       const unsigned char* __restrict__ down,   // [D, E], transposed, rows `down_bytes` apart
       const u32* masks,                         // [K or 1, WORDS]
       const float* values,                      // [CANDIDATES]
       const int* ids,                           // [CANDIDATES]
       const float* __restrict__ thresholds,     // [2], logarithms of squares
       const float* __restrict__ norms,          // [D]
       const float* up_part,                     // [D], read if UP_PART
       float4* partial,                          // [blocks, E], out
       long long gate_bytes, long long up_bytes, long long down_bytes) {
    enum { GATE, UP, DOWN };
    extern __shared__ __align__(128) unsigned char ring[];  // [WARPS, 3, ROW_BYTES]
    uint4* const given = reinterpret_cast<uint4*>(ring + WARPS * HELD_BYTES);  // the input
    u32* const list = reinterpret_cast<u32*>(given + CHUNKS);                  // [MOST]
    __shared__ u64 full[WARPS][3], arrived;
    __shared__ int mask_of[N];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    if (thread == 0) {
        for (int w = 0; w < WARPS; w++)
            for (int slot = 0; slot < 3; slot++) barrier_init(&full[w][slot], 1);
        barrier_init(&arrived, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        // This thread uses the barrier in a bulk copy right away.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    const float least_gate = expf(0.5f * thresholds[0]), least_up = expf(0.5f * thresholds[1]);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (thread == 0) {
        expect_bytes(&arrived, ROW_BYTES);
        fetch(shared_address(given), hidden, ROW_BYTES, &arrived);
    }
    const int neurons = find_neurons<THREADS>(masks, values, ids, 1, mask_of, list);

    unsigned char* const held = ring + warp * HELD_BYTES;
    u32 parity = 0;  // of the three barriers
    auto ask = [&](int slot, const unsigned char* row) {
        __syncwarp();  // every lane has read the row that was there
        if (lane == 0) {
            expect_bytes(&full[warp][slot], ROW_BYTES);
            fetch(shared_address(held) + slot * ROW_BYTES, row, ROW_BYTES, &full[warp][slot]);
        }
    };
    auto wait_for = [&](int slot) {
        barrier_wait(&full[warp][slot], parity >> slot & 1);
        parity ^= 1u << slot;
    };
    // The product of a row and the input, in every lane.
    auto multiply = [&](int slot) {
        const uint4* const row = reinterpret_cast<const uint4*>(held + slot * ROW_BYTES);
        float2 found = {0.0f, 0.0f};
#pragma unroll 4
        for (int i = 0; i < OWN; i++) {
            const int chunk = i * 32 + lane;
            if (CHUNKS % 32 != 0 && chunk >= CHUNKS) break;
            const uint4 weights = row[chunk], input = given[chunk];
            const u32 pairs[4] = {weights.x, weights.y, weights.z, weights.w}, inputs[4] = {input.x, input.y, input.z, input.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 a = widen(pairs[j]), b = widen(inputs[j]);
                found.x = fmaf(a.x, b.x, found.x);
                found.y = fmaf(a.y, b.y, found.y);
            }
        }
        return sum_of_warp(found.x + found.y);
    };

    // Of the neuron in each slot: a norm, and what the stages have computed. `up_coming` and `down_coming`: whether a row
    // is there or on its way.
    float next_norm = 0.0f, next_part = 0.0f, gate_value = 0.0f, up_norm = 0.0f, down_value = 0.0f;
    long long next = 0, in_up = 0;
    bool up_coming = false, down_coming = false;
    auto ask_gate = [&](int index) {
        next = list[index] & 0xFFFFFF;
        ask(GATE, gate + next * gate_bytes);
        next_norm = norms[next];
        if (UP_PART) next_part = __ldcg(up_part + next);
    };
    float sums[OWN][8] = {};
    if (warp < neurons) ask_gate(warp);
    barrier_wait(&arrived, 0);
    // In each round: down of the neuron before the last, up of the last neuron, gate of this one. Comparisons let NaN pass.
    for (int index = warp; index < neurons + 2 * WARPS; index += WARPS) {
        if (down_coming) {
            wait_for(DOWN);
            const uint4* const row = reinterpret_cast<const uint4*>(held + DOWN * ROW_BYTES);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const int chunk = i * 32 + lane;
                if (CHUNKS % 32 != 0 && chunk >= CHUNKS) break;
                const uint4 weights = row[chunk];
                const u32 pairs[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 w = widen(pairs[j]);
                    sums[i][2 * j] = fmaf(down_value, w.x, sums[i][2 * j]);
                    sums[i][2 * j + 1] = fmaf(down_value, w.y, sums[i][2 * j + 1]);
                }
            }
            down_coming = false;
        }
        if (up_coming) {
            wait_for(UP);
            const float x = gate_value * multiply(UP);
            down_coming = !(fabsf(x) * up_norm < least_up);
            if (down_coming) {
                ask(DOWN, down + in_up * down_bytes);
                down_value = round_half(x);
            }
            up_coming = false;
        }
        if (index < neurons) {
            wait_for(GATE);
            gate_value = activate(multiply(GATE));
            float importance = fabsf(gate_value) * next_norm;
            if (UP_PART) importance *= expf(0.5f * next_part);
            up_coming = !(importance < least_gate);
            in_up = next;
            up_norm = next_norm;
            if (up_coming) ask(UP, up + in_up * up_bytes);
            if (index + WARPS < neurons) ask_gate(index + WARPS);
        }
    }

    __syncwarp();  // a warp's sums go where its rows were
    float4* const mine = reinterpret_cast<float4*>(held);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int chunk = i * 32 + lane;
        if (CHUNKS % 32 != 0 && chunk >= CHUNKS) break;
        mine[2 * chunk] = float4{sums[i][0], sums[i][1], sums[i][2], sums[i][3]};
        mine[2 * chunk + 1] = float4{sums[i][4], sums[i][5], sums[i][6], sums[i][7]};
    }
    __syncthreads();
    for (int column = thread; column < E / 4; column += THREADS) {
        float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float4 part = reinterpret_cast<const float4*>(ring + w * HELD_BYTES)[column];
            total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
        }
        partial[static_cast<long long>(blockIdx.x) * (E / 4) + column] = total;
    }
}
