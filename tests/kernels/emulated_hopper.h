// csrc/hopper.cuh for g++: the cluster kernel on a CPU, each GPU thread a fiber, in an adversarial order.
//
// What a GPU may do and a naive emulation would not: warps run far ahead of each other; a bulk copy lands at once, or as late as somebody
// can still wait for it, and reads its source only then.  All threads waiting with no copy under way is a deadlock and ends the launch.
// Every element read from the logits and written to the gradient is counted, and one outside of them is an error.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cluster_row.h"

#define DEVICE inline

struct uint4 {
    uint32_t x, y, z, w;
};

constexpr int FIBERS_PER_BLOCK = 256, MAX_BLOCKS = 16, STACK = 64 << 10;

struct Barrier {  // laid over the 64 bits of an mbarrier
    int32_t bytes;  // still to come in this phase
    uint8_t phase;
    uint8_t arrivals;  // still to come in this phase
};

struct Rendezvous {  // of `size` fibers
    int size = 0, arrived = 0;
    long generation = 0;
};

struct Fiber {
    ucontext_t context;
    jmp_buf jump;
    bool started = false, done = false;
    int block, thread;
};

struct Copy {
    void* to;
    const void* from;
    uint32_t bytes;
    Barrier* barrier;
};

enum Land { AT_ONCE, SOMETIME, AS_LATE_AS_POSSIBLE };
enum Fault { NO_FAULT, DEADLOCK, READ_OUTSIDE, WRITTEN_OUTSIDE, NOT_ALIGNED, NOT_RUNNING };

struct Machine {
    int blocks, cluster, clusters;
    std::vector<std::vector<unsigned char>> shared;
    std::vector<Fiber> fibers;
    std::vector<Rendezvous> block_barrier, warp_barrier;
    Rendezvous cluster_barrier;
    std::vector<Partial> lanes;  // what each thread brought to a shuffle
    std::vector<Copy> copies;    // under way
    long events = 0;             // arrivals, landings, ends: a round without one is a deadlock
    uint64_t random;
    Land copies_land;
    Fault fault;
    uint64_t logits, out;       // addresses
    int64_t element_size;
    std::vector<uint8_t> reads, writes;  // per element
    char* stacks;
};
static Machine gpu;
static Fiber* current;
static jmp_buf scheduler;

inline uint32_t random_bits() {
    gpu.random = gpu.random * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(gpu.random >> 33);
}

inline void yield() {
    if (_setjmp(current->jump) == 0) _longjmp(scheduler, 1);
}

inline void meet(Rendezvous& r) {
    const long mine = r.generation;
    ++gpu.events;
    if (++r.arrived == r.size) {
        r.arrived = 0;
        ++r.generation;
        return;
    }
    while (r.generation == mine) yield();
}

inline void count(uint64_t address, uint64_t bytes, uint64_t base, std::vector<uint8_t>& counts, Fault outside) {
    const size_t first = (address - base) / gpu.element_size;
    if (address < base || first + bytes / gpu.element_size > counts.size()) {
        gpu.fault = outside;
        return;
    }
    for (uint64_t i = 0; i < bytes / gpu.element_size; ++i) ++counts[first + i];
}

inline void end_of_phase(Barrier* b) {
    if (b->arrivals == 0 && b->bytes == 0) b->phase ^= 1, b->arrivals = 1;
}

inline void land(size_t i) {
    const Copy c = gpu.copies[i];
    gpu.copies.erase(gpu.copies.begin() + i);
    memcpy(c.to, c.from, c.bytes);
    c.barrier->bytes -= c.bytes;
    end_of_phase(c.barrier);
    ++gpu.events;
}

// ---- the functions of hopper.cuh ---------------------------------------------------------------------------------------------------

inline unsigned char* shared_memory() { return gpu.shared[current->block].data(); }
inline int thread_index() { return current->thread; }
inline void block_sync() { meet(gpu.block_barrier[current->block]); }
inline uint32_t cluster_rank() { return current->block; }
inline uint32_t cluster_blocks() { return gpu.blocks; }
inline uint32_t cluster_index() { return gpu.cluster; }
inline uint32_t cluster_count() { return gpu.clusters; }
inline void cluster_sync() { meet(gpu.cluster_barrier); }

inline void store_in_block(Partial* mine, uint32_t rank, Partial p) {
    bool begun = false, ended = true;
    for (int i = 0; i < FIBERS_PER_BLOCK; ++i) {
        const Fiber& f = gpu.fibers[rank * FIBERS_PER_BLOCK + i];
        begun |= f.started, ended &= f.done;
    }
    if (!begun || ended) gpu.fault = NOT_RUNNING;
    const size_t offset = reinterpret_cast<unsigned char*>(mine) - shared_memory();
    memcpy(gpu.shared[rank].data() + offset, &p, sizeof p);
}

inline void warp_sync() { meet(gpu.warp_barrier[(current->block * FIBERS_PER_BLOCK + current->thread) / 32]); }

inline Partial shuffled(Partial p, int lane) {
    const int first = (current->block * FIBERS_PER_BLOCK + current->thread) / 32 * 32;
    gpu.lanes[first + current->thread % 32] = p;
    warp_sync();
    p = gpu.lanes[first + lane];
    warp_sync();  // before anyone brings the next value
    return p;
}

inline Partial shuffle_xor(Partial p, int mask) { return shuffled(p, current->thread % 32 ^ mask); }
inline float shuffle(float x, int lane) { return shuffled({x, 0, 0, 0}, lane).m2; }

inline void barrier_init(uint64_t* barrier) { *reinterpret_cast<Barrier*>(barrier) = {0, 0, 1}; }
inline void barrier_init_done() {}

inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    Barrier* b = reinterpret_cast<Barrier*>(barrier);
    if (uint64_t(to) % 16 || uint64_t(from) % 16 || bytes % 16) gpu.fault = NOT_ALIGNED;
    b->bytes += bytes;
    --b->arrivals;
    end_of_phase(b);
    ++gpu.events;
    if (bytes == 0) return;
    count(uint64_t(from), bytes, gpu.logits, gpu.reads, READ_OUTSIDE);
    if (gpu.fault) return;
    gpu.copies.push_back({to, from, bytes, b});
    if (gpu.copies_land == AT_ONCE) land(gpu.copies.size() - 1);
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    while (reinterpret_cast<volatile Barrier*>(barrier)->phase == parity) yield();
}

inline float fast_exp2(float x) { return exp2f(x); }
inline float floor_nan(float x) { return x < FLOOR ? FLOOR : x; }
inline uint32_t bits_of(float x) { uint32_t w; memcpy(&w, &x, 4); return w; }
inline float float_of(uint32_t w) { float x; memcpy(&x, &w, 4); return x; }

template <class E>
uint32_t max_of_each(uint32_t v, uint32_t w) {
    float x[2], y[2];
    E::unpack(v, x), E::unpack(w, y);
    for (int i = 0; i < E::PER_WORD; ++i) x[i] = fmaxf(x[i], y[i]);
    return E::pack(x);
}

struct BFloat16 {
    using Bits = uint16_t;
    static constexpr int PER_WORD = 2;
    static void unpack(uint32_t w, float* x) { x[0] = float_of(w << 16), x[1] = float_of(w & 0xffff0000u); }
    static uint32_t round(float x) {
        const uint32_t w = bits_of(x);
        return x != x ? 0x7fff : (w + 0x7fff + (w >> 16 & 1)) >> 16;
    }
    static uint32_t pack(const float* x) { return round(x[0]) | round(x[1]) << 16; }
    static uint32_t max(uint32_t v, uint32_t w) { return max_of_each<BFloat16>(v, w); }
};

struct Float16 {
    using Bits = uint16_t;
    static constexpr int PER_WORD = 2;
    static void unpack(uint32_t w, float* x) { _Float16 h[2]; memcpy(h, &w, 4); x[0] = h[0], x[1] = h[1]; }
    static uint32_t pack(const float* x) { const _Float16 h[2] = {_Float16(x[0]), _Float16(x[1])}; uint32_t w; memcpy(&w, h, 4); return w; }
    static uint32_t max(uint32_t v, uint32_t w) { return max_of_each<Float16>(v, w); }
};

struct Float32 {
    using Bits = uint32_t;
    static constexpr int PER_WORD = 1;
    static void unpack(uint32_t w, float* x) { x[0] = float_of(w); }
    static uint32_t pack(const float* x) { return bits_of(x[0]); }
    static uint32_t max(uint32_t v, uint32_t w) { return max_of_each<Float32>(v, w); }
};

template <class T>
T load_global(const T* p) {
    const uint64_t address = uint64_t(p);
    if (address >= gpu.logits && address < gpu.logits + gpu.reads.size() * gpu.element_size)  // not labels and inputs
        count(address, sizeof(T), gpu.logits, gpu.reads, READ_OUTSIDE);
    return *p;
}

inline void store_global(float* p, float x) { *p = x; }  // the table

template <class T>
void store_global(T* p, T x) {
    if (uint64_t(p) % sizeof(T)) gpu.fault = NOT_ALIGNED;
    count(uint64_t(p), sizeof(T), gpu.out, gpu.writes, WRITTEN_OUTSIDE);
    if (!gpu.fault) *p = x;
}
