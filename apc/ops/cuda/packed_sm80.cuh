// Rows of 4 bits (`packed.py`) in shared memory, and their products with a vector on tensor cores (Ampere to Hopper).
//
// A block has one multiprocessor and 16 warps that multiply, in one or two teams. While one team waits, the other
// multiplies. A team copies rows into its ring of slots in shared memory, 8 rows to a slot. The copies are asynchronous,
// so several slots are on their way while others are multiplied. On Hopper one more warp for each team asks for whole
// rows, and each slot has a barrier that counts the bytes. Elsewhere every thread copies pieces, and waits for its own in
// the order of their groups.
//
// A product takes 16 rows, from two slots. A chunk is 32 weights of a row, 16 bytes; each warp multiplies eight chunks
// of every row: an octet. A shift and a mask make two weights two numbers of 16 bits, OFFSET + k. The product's 8
// columns hold the inputs of one chunk each, so its sums are those of single chunks, which have levels of their own.
//
// Defined before this file: what `steps_sm80.cuh` needs; `barriers_sm90.cuh`; E; GROUP, weights that share levels;
// TEAMS, 1 or, on Hopper, 2; SLOTS of a team's ring.

constexpr int WARPS = 16, THREADS = 32 * WARPS;  // that multiply
constexpr int ALL_THREADS = THREADS + (HOPPER ? 32 * TEAMS : 0);
constexpr int TEAM_WARPS = WARPS / TEAMS, TEAM_THREADS = 32 * TEAM_WARPS;
constexpr int ROWS = 8;                                                          // of a slot
constexpr int CHUNKS = E / 32, OCTETS = (CHUNKS + 7) / 8;                        // of a row
constexpr int PER_GROUP = GROUP / 32, GROUPS = E / GROUP;                        // chunks of a group, groups of a row
constexpr int ROW_WORDS = (E / 2 + (2 * GROUPS + 3) / 4 * 4 + 8 + 15) / 16 * 4;  // of a packed row
constexpr int UNITS_AT = E / 8 + (2 * GROUPS + 3) / 4;                           // words before a row's units
constexpr int STRIDE = (ROW_WORDS + 15) / 32 * 32 + 16;  // words between rows of a slot: two use different banks
constexpr int SLOT = ROWS * STRIDE;                      // words
constexpr u32 MAGIC = BFLOAT ? 0x43004300u : 0x64006400u;
constexpr float OFFSET = BFLOAT ? 128.0f : 1024.0f;
static_assert(E % GROUP == 0 && GROUP % 32 == 0, "groups are whole chunks");

// The weights with numbers 2 s and 2 s + 1 in a word, as the lowest bits of two numbers of 16 bits.
__device__ __forceinline__ u32 pair(u32 word, int s, u32 magic) {
    u32 result;
    asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xEA;" : "=r"(result) : "r"(word >> 4 * s), "r"(magic));  // (a & b) | c
    return result;
}

// This thread's team, and whether it copies rows.
__device__ __forceinline__ int own_team() {
    return threadIdx.x < THREADS ? threadIdx.x / TEAM_THREADS : threadIdx.x / 32 - WARPS;
}
__device__ __forceinline__ bool copies_rows() { return !HOPPER || threadIdx.x >= THREADS; }

// The barriers of a ring's slots, on Hopper. Below, `copy(s)` starts to copy what the team's slot number s gets, by
// `copy_rows`.
struct Ring {
    u64 arrived[SLOTS], read[SLOTS];
};

__device__ __forceinline__ void make_rings(Ring (&rings)[TEAMS]) {
    if (HOPPER && threadIdx.x == 0) {
        for (int team = 0; team < TEAMS; team++)
            for (int i = 0; i < SLOTS; i++) {
                barrier_init(&rings[team].arrived[i], 1);
                barrier_init(&rings[team].read[i], 1);
            }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // bulk copies use them right away
    }
    __syncthreads();
}

// Starts to copy up to COUNT rows of EACH words to slot number s, `stride` words apart. row_of(i) is row i's address, or
// null. All threads call it, or on Hopper the warp that copies.
template <int COUNT, int EACH, typename RowOf>
__device__ __forceinline__ void copy_rows(Ring& ring, int s, u32* slot, int stride, const RowOf& row_of) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (HOPPER) {
        u64* const arrived = &ring.arrived[s % SLOTS];
        const u32* const row = lane < COUNT ? row_of(lane) : nullptr;
        const int rows = __popc(__ballot_sync(~0u, row != nullptr));
        if (lane == 0 && rows > 0) expect_bytes(arrived, rows * 4 * EACH);
        __syncwarp();
        if (row != nullptr) fetch(shared_address(slot + lane * stride), row, 4 * EACH, arrived);
    } else {
        const u32* const row = row_of(warp % COUNT);
        if (row != nullptr)
#pragma unroll 3
            for (int i = warp / COUNT * 32 + lane; i < EACH / 4; i += 32 * WARPS / COUNT)
                copy_piece(slot + warp % COUNT * stride + 4 * i, row + 4 * i);
        end_group();
    }
}

// Waits until slot number s has arrived, after which LEFT copies began. Other threads' pieces need `wait_for_team`.
template <int LEFT>
__device__ __forceinline__ void wait_for_slot(Ring& ring, int s) {
    if (HOPPER)
        barrier_wait(&ring.arrived[s % SLOTS], (s / SLOTS) & 1);
    else
        wait_for_groups<LEFT>();
}

// A barrier of the warps that multiply, and one of a team.
__device__ __forceinline__ void wait_for_warps() {
    if (HOPPER)
        asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory");
    else
        __syncthreads();
}
__device__ __forceinline__ void wait_for_team(int team) {
    if (HOPPER)
        asm volatile("bar.sync %0, %1;" :: "r"(2 + team), "n"(TEAM_THREADS) : "memory");
    else
        __syncthreads();
}

// Lets slot number s + SLOTS take the place of slot number s, which all warps of the team have read.
template <typename Copy>
__device__ __forceinline__ void replace_slot(Ring& ring, int s, const Copy& copy) {
    if (HOPPER) {
        if (threadIdx.x % TEAM_THREADS == 0) barrier_arrive(&ring.read[s % SLOTS]);
    } else {
        copy(s + SLOTS);
    }
}

// Copies the slots from number `first` on, up to `end`, each as soon as it is free.
template <typename Copy>
__device__ __forceinline__ void copy_slots(Ring& ring, int first, int end, const Copy& copy) {
#pragma unroll 1
    for (int s = first; s < end; s++) {
        if (HOPPER && s >= SLOTS) barrier_wait(&ring.read[s % SLOTS], (s / SLOTS + 1) & 1);
        copy(s);
    }
}

// A block's input, filled up with zeros to whole octets.
struct Input {
    uint4 values[32 * OCTETS], zeros[4];
    float sums[8 * OCTETS];  // of each chunk
    float squares[WARPS];
};

// The sum over the threads that multiply, in all of them.
__device__ __forceinline__ float sum_of_block(float x, float (&sums)[WARPS]) {
    x = sum_of_warp(x);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    wait_for_warps();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[w];
    wait_for_warps();
    return sum;
}

// The RMS norm's weights, which need no other kernel.
constexpr int PIECES = 4 * CHUNKS, EACH_PIECES = (32 * OCTETS + THREADS - 1) / THREADS;  // of 8 inputs; of a thread
struct Norm {
    uint4 values[EACH_PIECES];
};
__device__ __forceinline__ Norm load_norm(const uint4* __restrict__ norm) {
    Norm result;
#pragma unroll
    for (int j = 0; j < EACH_PIECES; j++) {
        const int i = j * THREADS + threadIdx.x;
        result.values[j] = norm != nullptr && i < PIECES ? norm[i] : uint4{0, 0, 0, 0};
    }
    return result;
}

// A thread's pieces of x and of what is added to it. Its loads come before those of many rows: they need not wait for
// these, if a kernel sets the input later.
struct Pieces {
    uint4 x[EACH_PIECES], added[EACH_PIECES];
};
__device__ __forceinline__ Pieces load_pieces(const uint4* x, const uint4* added) {
    Pieces result;
#pragma unroll
    for (int j = 0; j < EACH_PIECES; j++) {
        const int i = j * THREADS + threadIdx.x;
        result.x[j] = i < PIECES ? x[i] : uint4{0, 0, 0, 0};
        result.added[j] = added != nullptr && i < PIECES ? added[i] : uint4{0, 0, 0, 0};
    }
    return result;
}

// Sets the input to x + added, rounded, or, with a norm, to its RMS norm, rounded. `total`, if not null, gets x + added.
// Returns the input's sum of squares, if `squares` asks for it.
__device__ __forceinline__ float set_input(Input& input, const Pieces& pieces, bool norms, const Norm& norm,
                                           float epsilon, uint4* total, bool squares) {
    float own[EACH_PIECES][8], square = 0.0f;
#pragma unroll
    for (int j = 0; j < EACH_PIECES; j++) {
        const int i = j * THREADS + threadIdx.x;
        float more[8];
        widen8(pieces.x[j], own[j]);
        widen8(pieces.added[j], more);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            own[j][k] = round_half(own[j][k] + more[k]);
            square = fmaf(own[j][k], own[j][k], square);
        }
        if (total != nullptr && i < PIECES) total[i] = narrow8(own[j]);
    }
    if (norms) {
        const float scale = 1.0f / sqrtf(sum_of_block(square, input.squares) / E + epsilon);
        square = 0.0f;
#pragma unroll
        for (int j = 0; j < EACH_PIECES; j++) {
            float weights[8];
            widen8(norm.values[j], weights);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                own[j][k] = round_half(own[j][k] * (weights[k] * scale));
                square = fmaf(own[j][k], own[j][k], square);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < EACH_PIECES; j++) {
        const int i = j * THREADS + threadIdx.x;
        float sum = ((own[j][0] + own[j][1]) + (own[j][2] + own[j][3])) + ((own[j][4] + own[j][5]) + (own[j][6] + own[j][7]));
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (i < 32 * OCTETS) {
            input.values[i] = narrow8(own[j]);
            if (i % 4 == 0) input.sums[i / 4] = sum;
        }
    }
    if (threadIdx.x < 4) input.zeros[threadIdx.x] = uint4{0, 0, 0, 0};
    return squares ? sum_of_block(square, input.squares) : 0.0f;
}

// Steps (lower half) and lows of the chunks `chunk`, which is even, and `chunk + 1` of a row, a byte each.
__device__ __forceinline__ u32 load_levels(const u32* row, int chunk) {
    const unsigned char* const steps = reinterpret_cast<const unsigned char*>(row) + E / 2 + chunk / PER_GROUP;
    const unsigned char* const lows = steps + GROUPS;
    u32 step, low;
    if (PER_GROUP > 1) {
        step = steps[0] * 0x101u, low = lows[0] * 0x101u;
    } else if (GROUPS % 2 == 1) {
        step = steps[0] | steps[1] << 8, low = lows[0] | lows[1] << 8;
    } else {
        step = *reinterpret_cast<const unsigned short*>(steps), low = *reinterpret_cast<const unsigned short*>(lows);
    }
    return step | low << 16;
}

// Adds the products of an octet of two rows, lane / 4 of each slot, to their sums: of steps, and of lows. In a product,
// the lanes of column c have the inputs of chunk c, and zeros else. What a row lacks of an octet is multiplied with zeros.
__device__ __forceinline__ void add_octet(const u32* above, const u32* below, const Input& input, int octet,
                                          float (&sums)[2][2]) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    float products[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int at = 8 * octet + 4 * half + t;  // chunk
        const uint4* const inputs = lane / 4 == 4 * half + t ? input.values + 4 * at : input.zeros;
        const uint4 a = *reinterpret_cast<const uint4*>(above + 4 * at), b = *reinterpret_cast<const uint4*>(below + 4 * at);
        const u32 up[4] = {a.x, a.y, a.z, a.w}, down[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4 values = inputs[j];
            const u32 of_word[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
            for (int s = 0; s < 4; s += 2)
                multiply(products[half], pair(up[j], s, MAGIC), pair(down[j], s, MAGIC), pair(up[j], s + 1, MAGIC),
                         pair(down[j], s + 1, MAGIC), of_word[s], of_word[s + 1]);
        }
    }
    const int chunk = 8 * octet + 2 * t;
    const float2 of_inputs = *reinterpret_cast<const float2*>(&input.sums[chunk]);
    const float sum_of[2] = {of_inputs.x, of_inputs.y};
    const u32 levels[2] = {load_levels(above, chunk), load_levels(below, chunk)};
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float product = products[0][2 * r + c] + products[1][2 * r + c];
            const float step = static_cast<float>(levels[r] >> 8 * c & 0xFF);
            const float low = static_cast<float>(static_cast<int>(levels[r] << (8 - 8 * c)) >> 24);
            sums[r][0] = fmaf(step, product - OFFSET * sum_of[c], sums[r][0]);
            sums[r][1] = fmaf(low, sum_of[c], sums[r][1]);
        }
    }
}

constexpr int USED = OCTETS < TEAM_WARPS ? OCTETS : TEAM_WARPS;  // warps of a team that multiply

// Writes a part of the products of the rows of two slots, for each warp of a team.
__device__ __forceinline__ void multiply_slots(const u32* first, const u32* second, const Input& input,
                                               float (&parts)[TEAM_WARPS][2 * ROWS]) {
    const int lane = threadIdx.x % 32, t = lane % 4, warp = threadIdx.x / 32 % TEAM_WARPS;
    if (warp >= USED) return;
    const u32* const above = first + lane / 4 * STRIDE;
    const u32* const below = second + lane / 4 * STRIDE;
    const float* const units = reinterpret_cast<const float*>(above + UNITS_AT);
    const float* const units_below = reinterpret_cast<const float*>(below + UNITS_AT);
    float sums[2][2] = {};
#pragma unroll 1
    for (int octet = warp; octet < OCTETS; octet += TEAM_WARPS) add_octet(above, below, input, octet, sums);
    const float a = fmaf(sums[0][0], units[0], sums[0][1] * units[1]);
    const float b = fmaf(sums[1][0], units_below[0], sums[1][1] * units_below[1]);
    float sum = (t % 2 ? b : a) + __shfl_xor_sync(~0u, t % 2 ? a : b, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (t < 2) parts[warp][ROWS * t + lane / 4] = sum;
}

// The sum of the warps' parts for the row lane % 16.
__device__ __forceinline__ float sum_of_parts(const float (&parts)[TEAM_WARPS][2 * ROWS]) {
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < USED; w += 2)
        if (w + lane / 16 < USED) sum += parts[w + lane / 16][lane % 16];
    return sum + __shfl_xor_sync(~0u, sum, 16);
}
