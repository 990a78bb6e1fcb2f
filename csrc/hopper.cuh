// The instructions of sm_90a that the cluster kernel needs, one function each, and the three element types.
// tests/kernels/emulated_hopper.h has the same functions for g++, so that the kernel runs on a CPU thread by thread.
#pragma once
#include <cuda_runtime.h>

#include "cluster_row.h"

#define DEVICE __device__ __forceinline__

extern __shared__ __align__(128) unsigned char dynamic_shared[];

DEVICE unsigned char* shared_memory() { return dynamic_shared; }
DEVICE int thread_index() { return threadIdx.x; }
DEVICE void block_sync() { __syncthreads(); }
DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- clusters ---------------------------------------------------------------------------------------------------------------------

DEVICE uint32_t cluster_rank() { uint32_t x; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x)); return x; }
DEVICE uint32_t cluster_blocks() { uint32_t x; asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x)); return x; }
DEVICE uint32_t cluster_index() { uint32_t x; asm("mov.u32 %0, %%clusterid.x;" : "=r"(x)); return x; }
DEVICE uint32_t cluster_count() { uint32_t x; asm("mov.u32 %0, %%nclusterid.x;" : "=r"(x)); return x; }

// All threads of all blocks; what was written before it is seen after it.  Not .aligned: lane 0 of a warp often comes from a branch of its own
DEVICE void cluster_sync() { asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory"); }

// Store `p` at the place in block `rank` that `mine` has in this block
DEVICE void store_in_block(Partial* mine, uint32_t rank, Partial p) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(mine)), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(p.m2), "f"(p.s), "f"(p.t), "f"(p.z) : "memory");
}

DEVICE Partial shuffle_xor(Partial p, int mask) {
    return {__shfl_xor_sync(~0u, p.m2, mask), __shfl_xor_sync(~0u, p.s, mask), __shfl_xor_sync(~0u, p.t, mask),
            __shfl_xor_sync(~0u, p.z, mask)};
}

DEVICE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }

// ---- bulk copies: the copy engine fills shared memory and tells a barrier, no thread waits in between -------------------------------

DEVICE void barrier_init(uint64_t* barrier) {  // one arrival per phase: the thread that asks for the copy
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// 16-byte aligned addresses and size; 0 bytes complete the phase at once
DEVICE void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    const uint32_t b = shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
    if (bytes)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                     "l"(from), "r"(bytes), "r"(b)
                     : "memory");
}

DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!done);
}

// ---- arithmetic -------------------------------------------------------------------------------------------------------------------

DEVICE float fast_exp2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// max(x, FLOOR) that keeps NaN: fmaxf would make a row with a NaN finite
DEVICE float floor_nan(float x) { float y; asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(FLOOR)); return y; }

// ---- element types: two 16-bit elements, or one of 32 bits, per word ----------------------------------------------------------------

struct BFloat16 {
    using Bits = uint16_t;
    static constexpr int PER_WORD = 2;
    static DEVICE void unpack(uint32_t w, float* x) { x[0] = __uint_as_float(w << 16), x[1] = __uint_as_float(w & 0xffff0000u); }
    static DEVICE uint32_t pack(const float* x) {
        uint32_t w;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(x[1]), "f"(x[0]));
        return w;
    }
    static DEVICE uint32_t max(uint32_t v, uint32_t w) {  // drops NaN; two elements in one instruction
        uint32_t m;
        asm("max.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(v), "r"(w));
        return m;
    }
};

struct Float16 {
    using Bits = uint16_t;
    static constexpr int PER_WORD = 2;
    static DEVICE void unpack(uint32_t w, float* x) {
        asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}" : "=f"(x[0]), "=f"(x[1]) : "r"(w));
    }
    static DEVICE uint32_t pack(const float* x) {
        uint32_t w;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(x[1]), "f"(x[0]));
        return w;
    }
    static DEVICE uint32_t max(uint32_t v, uint32_t w) {
        uint32_t m;
        asm("max.f16x2 %0, %1, %2;" : "=r"(m) : "r"(v), "r"(w));
        return m;
    }
};

struct Float32 {
    using Bits = uint32_t;
    static constexpr int PER_WORD = 1;
    static DEVICE void unpack(uint32_t w, float* x) { x[0] = __uint_as_float(w); }
    static DEVICE uint32_t pack(const float* x) { return __float_as_uint(x[0]); }
    static DEVICE uint32_t max(uint32_t v, uint32_t w) { return __float_as_uint(fmaxf(__uint_as_float(v), __uint_as_float(w))); }
};

// ---- global memory: told so, or the compiler, which cannot see where an address of struct Job points, takes slower generic accesses ----

template <class T>
DEVICE T load_global(const T* p) {
    __builtin_assume(__isGlobal(p));
    return *p;
}

template <class T>
DEVICE void store_global(T* p, T x) {
    __builtin_assume(__isGlobal(p));
    *p = x;
}
