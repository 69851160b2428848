// Runs a CUDA C++ kernel on the CPU, one block after the other: `emulator.py` places this file before the source.
//
// The threads of a block are fibers, and only one of them runs at a time. Shared memory starts out as 0xFF bytes.
// Warps, the lanes of a warp, and blocks take turns in ascending or in descending order: a warp runs until its lanes
// wait for others, and after each barrier the first one comes first again. So of two threads that a barrier should
// separate, one is ahead in one order and the other in the other.
//
// Emulated: shuffles and ballots, __syncthreads, named barriers, `mbarrier`, cp.async and bulk copies, and
// mma.m16n8k16. The destination of a copy is 0xFF bytes until the copy has been waited for. Not emulated:
// griddepcontrol (each kernel runs alone), how tensor cores round inside a product (here once, from double), fences,
// caches and bank conflicts. expf and erff are those of the C library.

#include <signal.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ __attribute__((section("shared_memory"))) static

typedef unsigned int u32;
typedef unsigned long long u64;
using std::max;
using std::min;

struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct Dimensions {
    u32 x, y, z;
};
static Dimensions threadIdx, blockIdx, gridDim;

extern "C" char __start_shared_memory[] __attribute__((visibility("hidden")));  // by the linker
extern "C" char __stop_shared_memory[] __attribute__((visibility("hidden")));

template <typename To, typename From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "types of the same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(u32 x) { return same_bits<float>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline u32 __byte_perm(u32 low, u32 high, u32 selectors) {
    const u64 bytes = low | static_cast<u64>(high) << 32;
    u32 result = 0;
    for (int i = 0; i < 4; i++) result |= static_cast<u32>(bytes >> (selectors >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return result;
}

// Threads, as fibers.

constexpr int MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32, STACK_BYTES = 1 << 16;

struct Fiber {
    void* stack_pointer;
    bool ended;
    int exchanges;  // of its warp that it has begun
};
static Fiber fibers[MAX_THREADS];
static void* scheduler;               // its stack pointer
static std::function<void()> kernel;  // with its arguments
static int running_threads;           // of the block, not ended
static long progress;                 // how often a thread began, went on after a wait, or ended
static bool released;                 // a barrier has got its last arrival since the scheduler looked
static char failure[200];             // why the kernel was stopped, or empty

extern "C" void switch_stacks(void** from, void* to);
asm(R"(
.text
.hidden switch_stacks
.globl switch_stacks
switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

static void let_others_run() { switch_stacks(&fibers[threadIdx.x].stack_pointer, scheduler); }

static void fail(const char* reason) {
    snprintf(failure, sizeof failure, "%s (block %u, thread %u)", reason, blockIdx.x, threadIdx.x);
    let_others_run();
}

static void fail_outside(int) { fail("access outside of tensors"); }  // on SIGSEGV

template <typename Ready>
inline void wait_until(const Ready& ready) {
    do {
        let_others_run();
    } while (!ready());
    progress++;
}

static void run_thread() {
    progress++;
    kernel();
    progress++;
    running_threads--;
    released = true;
    fibers[threadIdx.x].ended = true;
    let_others_run();
}

// Barriers of a block. Number 0 is that of __syncthreads, for all threads that have not ended.

struct Barrier {
    int arrived;
    int completed;
};
static Barrier barriers[16];

inline void named_barrier(int id, int threads) {
    Barrier& barrier = barriers[id];
    const int before = barrier.completed;
    const auto is_complete = [&] { return barrier.arrived >= (id == 0 ? running_threads : threads); };
    barrier.arrived++;
    if (is_complete()) released = true;
    wait_until([&] {
        if (barrier.completed == before && is_complete()) {
            barrier.arrived = 0;
            barrier.completed++;
        }
        return barrier.completed > before;
    });
}
inline void __syncthreads() { named_barrier(0, 0); }

// Operations of a warp: each waits for all 32 lanes, which give each other words.

enum Operation { SYNC, SHUFFLE, BALLOT, MULTIPLY };
struct Exchange {
    int arrived;  // lanes, ever
    Operation operation;
    u32 words[32][6];
};
static Exchange exchanges[MAX_WARPS][2];  // no lane is two exchanges ahead of another

inline int own_lane() { return threadIdx.x % 32; }

template <int COUNT>
inline const u32 (&exchange(Operation operation, const u32 (&words)[COUNT]))[32][6] {
    const int number = fibers[threadIdx.x].exchanges++;
    Exchange& own = exchanges[threadIdx.x / 32][number % 2];
    if (own.arrived % 32 > 0 && own.operation != operation) fail("lanes of a warp call different functions");
    own.operation = operation;
    own.arrived++;
    memcpy(own.words[own_lane()], words, sizeof words);
    wait_until([&] { return own.arrived >= 32 * (number / 2 + 1); });
    return own.words;
}

inline void __syncwarp() { exchange(SYNC, {0}); }
template <typename T>
inline T shuffle(T x, int lane) {
    return same_bits<T>(exchange(SHUFFLE, {same_bits<u32>(x)})[lane][0]);
}
template <typename T>
inline T __shfl_sync(u32, T x, int lane) {
    return shuffle(x, lane % 32);
}
template <typename T>
inline T __shfl_xor_sync(u32, T x, int distance) {
    return shuffle(x, own_lane() ^ distance);
}
template <typename T>
inline T __shfl_up_sync(u32, T x, int distance) {
    return shuffle(x, own_lane() >= distance ? own_lane() - distance : own_lane());
}
inline u32 __ballot_sync(u32, bool x) {
    const auto& words = exchange(BALLOT, {x});
    u32 result = 0;
    for (int lane = 0; lane < 32; lane++) result |= words[lane][0] << lane;
    return result;
}

// Numbers of 16 bits, and tensor cores.

inline float to_float(unsigned short x, bool is_bfloat) {
    return is_bfloat ? same_bits<float>(static_cast<u32>(x) << 16) : static_cast<float>(same_bits<_Float16>(x));
}
inline unsigned short to_half(float x, bool is_bfloat) {
    if (!is_bfloat) return same_bits<unsigned short>(static_cast<_Float16>(x));
    if (x != x) return 0x7FFF;
    const u32 bits = same_bits<u32>(x);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // ties to even
}

// mma.m16n8k16.row.col with sums in float32. `operands` are a lane's four words of A and two of B.
inline void multiply_16_8_16(float (&sums)[4], const u32 (&operands)[6], bool is_bfloat) {
    const auto& words = exchange(MULTIPLY, operands);
    for (int i = 0; i < 4; i++) {
        const int row = own_lane() / 4 + i / 2 * 8, column = own_lane() % 4 * 2 + i % 2;
        double sum = sums[i];
        for (int k = 0; k < 16; k++) {
            const u32 a = words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const u32 b = words[column * 4 + k % 8 / 2][4 + k / 8];
            sum += static_cast<double>(to_float(a >> k % 2 * 16, is_bfloat)) * to_float(b >> k % 2 * 16, is_bfloat);
        }
        sums[i] = sum;
    }
}

// Asynchronous copies: bytes arrive as late as the waits allow.

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

static Copy begin_copy(void* to, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("misaligned copy");
    memcpy(to, from, bytes);  // an address outside of tensors fails here, in the thread that gave it
    memset(to, 0xFF, bytes);
    return {to, from, bytes};
}
static void end_copies(std::vector<Copy>& copies) {
    for (const Copy& copy : copies) memcpy(copy.to, copy.from, copy.bytes);
    copies.clear();
}

static std::deque<std::vector<Copy>> groups[MAX_THREADS];  // of cp.async; the last one is still open

inline void async_copy(void* to, const void* from) { groups[threadIdx.x].back().push_back(begin_copy(to, from, 16)); }
inline void commit_group() { groups[threadIdx.x].emplace_back(); }
inline void wait_group(int left) {
    auto& own = groups[threadIdx.x];
    while (static_cast<int>(own.size()) - 1 > left) {
        end_copies(own.front());
        own.pop_front();
    }
}

// Barriers that count bytes (`mbarrier`), and bulk copies.

struct ByteBarrier {
    int arrivals;  // of a phase
    int left;      // of these
    int phases;    // that are completed
    int expected;  // bytes
    std::vector<Copy> copies;
};
static std::map<const u64*, ByteBarrier> byte_barriers;

inline ByteBarrier& byte_barrier(const u64* address) {
    const auto found = byte_barriers.find(address);
    if (found == byte_barriers.end()) fail("no barrier there");
    return found->second;
}
inline void init_byte_barrier(const u64* address, int arrivals) {
    byte_barriers[address] = {arrivals, arrivals, 0, 0, {}};
}
inline void complete_phase(ByteBarrier& barrier) {
    int bytes = 0;
    for (const Copy& copy : barrier.copies) bytes += copy.bytes;
    if (barrier.left > 0 || bytes != barrier.expected) return;
    end_copies(barrier.copies);
    barrier.left = barrier.arrivals;
    barrier.expected = 0;
    barrier.phases++;
}
inline void arrive(const u64* address, int bytes) {
    ByteBarrier& barrier = byte_barrier(address);
    if (barrier.left == 0) fail("more arrivals than a phase has");
    barrier.expected += bytes;
    barrier.left--;
    if (barrier.left == 0) released = true;
}
inline void wait_for_parity(const u64* address, u32 parity) {
    ByteBarrier& barrier = byte_barrier(address);
    wait_until([&] {
        if (barrier.phases % 2 == parity) complete_phase(barrier);
        return barrier.phases % 2 != parity;
    });
}
inline u32 shared_offset(const void* pointer) { return static_cast<const char*>(pointer) - __start_shared_memory; }
inline void bulk_copy(u32 to, const void* from, int bytes, const u64* address) {
    if (bytes % 16) fail("misaligned copy");
    byte_barrier(address).copies.push_back(begin_copy(__start_shared_memory + to, from, bytes));
}

// Launches.

static void begin_block(int number, int threads, char* stacks) {
    blockIdx = {static_cast<u32>(number), 0, 0};
    memset(__start_shared_memory, 0xFF, __stop_shared_memory - __start_shared_memory);
    memset(exchanges, 0, sizeof exchanges);
    memset(barriers, 0, sizeof barriers);
    byte_barriers.clear();
    running_threads = threads;
    for (int i = 0; i < threads; i++) {
        groups[i].assign(1, {});
        void** top = reinterpret_cast<void**>(stacks + (i + 1) * STACK_BYTES);
        *--top = nullptr;  // aligns the stack as a call would
        *--top = reinterpret_cast<void*>(run_thread);
        for (int saved = 0; saved < 6; saved++) *--top = nullptr;
        fibers[i] = {top, false, 0};
    }
}

static void run_warp(int first, int step) {
    for (int lane = 0; lane < 32; lane++) {
        const int thread = first + lane * step;
        if (fibers[thread].ended) continue;
        threadIdx = {static_cast<u32>(thread), 0, 0};
        switch_stacks(&scheduler, fibers[thread].stack_pointer);
        if (failure[0]) return;
    }
}

static void run_block(int threads, bool backwards) {
    while (running_threads > 0) {
        const long before = progress;
        for (int warp = 0; warp < threads / 32;) {
            const long before_warp = progress;
            released = false;
            run_warp(backwards ? threads - 1 - 32 * warp : 32 * warp, backwards ? -1 : 1);
            if (failure[0]) return;
            if (released)
                warp = 0;
            else if (progress == before_warp)
                warp++;
        }
        if (progress == before) {
            snprintf(failure, sizeof failure, "all threads wait (block %u)", blockIdx.x);
            return;
        }
    }
}

static const char* run_blocks(int blocks, int threads, bool backwards) {
    const std::unique_ptr<char[]> stacks(new char[threads * STACK_BYTES]);
    struct sigaction action = {}, previous;
    action.sa_handler = fail_outside;
    action.sa_flags = SA_NODEFER;  // it never returns
    sigaction(SIGSEGV, &action, &previous);
    gridDim = {static_cast<u32>(blocks), 1, 1};
    failure[0] = 0;
    for (int i = 0; i < blocks && !failure[0]; i++) {
        begin_block(backwards ? blocks - 1 - i : i, threads, stacks.get());
        run_block(threads, backwards);
    }
    sigaction(SIGSEGV, &previous, nullptr);
    return failure[0] ? failure : nullptr;
}

template <typename... Arguments, size_t... I>
static void set_kernel(void (*function)(Arguments...), void** arguments, std::index_sequence<I...>) {
    kernel = [=] { function(*static_cast<Arguments*>(arguments[I])...); };
}
template <typename... Arguments>
static const char* launch(void (*function)(Arguments...), void** arguments, int blocks, int threads, bool backwards) {
    set_kernel(function, arguments, std::index_sequence_for<Arguments...>());
    return run_blocks(blocks, threads, backwards);
}

// The function that Python calls. It returns null or why the kernel was stopped.
#define LAUNCH(name)                                                                             \
    extern "C" __attribute__((visibility("default"))) const char* launch_##name(                 \
        void** arguments, int blocks, int threads, bool backwards) {                             \
        return launch(name, arguments, blocks, threads, backwards);                              \
    }
