// One-pass loss and gradient over logits [tokens, vocabulary] on Hopper: each logit is read once and its gradient written once.
//
// A row is dealt to the thread blocks of a cluster; every block keeps its slice in shared memory between the two uses:
//
//   copy engine -> tiles of the slice -> partial statistics, while tiles arrive
//   partial statistics -> every block of the cluster (distributed shared memory), one cluster barrier
//   merged statistics -> the token's terms, its weight, the table (block 0) and the gradient's scalars (each block for itself)
//   slice in shared memory -> gradient -> global memory; a tile that all threads have used is at once refilled with the next row
//
// Clusters are persistent and walk over rows; two or three blocks share a multiprocessor, so that while one computes statistics, with its
// shared memory full and nothing in flight, the others load and store.  What it computes: kernels/loss.py, PARTIALS=None.
//
// Built by kernels/cluster.py with -DELEMENT=... and -include of the generated loss (struct Twin).
#ifdef __CUDACC__
#include "hopper.cuh"
#else
#include "emulated_hopper.h"
#endif

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int UNROLL = 4;                       // vectors per thread and tile: with one maximum for all, 32 bf16 share one rescaling
constexpr int TILE = UNROLL * THREADS;          // vectors, 16 KiB: what one barrier announces
constexpr int MAX_TILES = 16, MAX_CLUSTER = 16;

struct Mail {  // behind the slice in shared memory
    Partial part[WARPS];
    Verdict verdict;
    float numbers[NUMBERS];
    uint64_t full[MAX_TILES];  // barrier of each tile: its phase ends when the bytes of a row are there
    Partial inbox[];           // [2][blocks of the cluster]: rows alternate, so that one cluster barrier per row is enough
};
static_assert(sizeof(Mail) <= 384, "kernels/cluster.py reserves 384 bytes");

template <class E>
struct Slice {
    static constexpr int VECTOR = 4 * E::PER_WORD;  // elements
    Cut cut;
    int vectors;        // of this block
    const uint4* from;  // in global memory
    int edge;           // column at an edge of the row that this thread takes, or -1
    int label;          // offset of the label's column from the slice's first, if this thread takes it, or -1
    bool label_at_edge;

    DEVICE Slice(const Job& job, int64_t row, int rank) {
        const uint64_t address = uint64_t(job.logits) + row * job.stride * sizeof(typename E::Bits);
        cut = cut_row(address, job.valid, sizeof(typename E::Bits));
        vectors = vectors_of_slice(cut, rank, job.slice_vectors);
        from = reinterpret_cast<const uint4*>(address + cut.head * sizeof(typename E::Bits)) + rank * job.slice_vectors;
    }

    DEVICE void deal(const Job& job, int64_t y, int rank, int blocks, int thread) {
        edge = rank == blocks - 1 ? edge_column(cut, job.valid, VECTOR, thread) : -1;
        label_at_edge = edge >= 0 && edge == y;
        const int64_t offset = y - cut.head - int64_t(rank) * job.slice_vectors * VECTOR;
        const bool here = y < job.valid && offset >= 0 && offset < vectors * VECTOR;
        label = here && int(offset) / VECTOR % THREADS == thread ? int(offset) : -1;
    }
};

template <class E>
DEVICE float to_float(typename E::Bits bits) {
    float x[2];
    E::unpack(bits, x);
    return x[0];
}

template <class E>
DEVICE typename E::Bits from_float(float value) {
    const float x[2] = {value, 0.f};
    return typename E::Bits(E::pack(x));
}

// Ask the copy engine for one tile of a row.  One thread, when no thread uses what the tile held before.
template <class E>
DEVICE void load_tile(const Slice<E>& slice, int tile, uint4* data, Mail* mail) {
    const int left = slice.vectors - tile * TILE, vectors = left < 0 ? 0 : left < TILE ? left : TILE;
    bulk_load(data + tile * TILE, slice.from + tile * TILE, vectors * 16, mail->full + tile);
}

// Add N vectors to the partial sums of this thread
template <class E, int N>
DEVICE void fold(Partial& p, const uint4 (&v)[N], float scale2) {
    uint32_t word[4 * N];
#pragma unroll
    for (int i = 0; i < N; ++i) word[4 * i] = v[i].x, word[4 * i + 1] = v[i].y, word[4 * i + 2] = v[i].z, word[4 * i + 3] = v[i].w;
    uint32_t top = word[0];
#pragma unroll
    for (int i = 1; i < 4 * N; ++i) top = E::max(top, word[i]);
    float x[2];
    E::unpack(top, x);
    const float m2 = fmaxf(p.m2, (E::PER_WORD == 2 ? fmaxf(x[0], x[1]) : x[0]) * scale2);
    float s[2] = {0.f, 0.f}, t[2] = {0.f, 0.f};  // two chains of additions
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) {
        E::unpack(word[i], x);
#pragma unroll
        for (int j = 0; j < E::PER_WORD; ++j) {
            const float y = floor_nan(fmaf(x[j], scale2, -m2)), e = fast_exp2(y);
            s[i % 2] += e;
            t[i % 2] = fmaf(y, e, t[i % 2]);
        }
    }
    const float shift = fmaxf(p.m2 - m2, FLOOR), k = fast_exp2(shift);
    p = {m2, fmaf(p.s, k, s[0] + s[1]), fmaf(fmaf(p.s, shift, p.t), k, t[0] + t[1]), p.z};
}

// Partial sums over this thread's part of the slice, waiting for each tile
template <class E>
DEVICE Partial read_slice(const Slice<E>& slice, const uint4* data, Mail* mail, uint32_t parity, int tiles, float scale2) {
    Partial p{EMPTY, 0.f, 0.f, -INFINITY};
    const int whole = slice.vectors / TILE;
    const uint4* mine = data + thread_index();
    for (int tile = 0; tile < whole; ++tile, mine += TILE) {
        barrier_wait(mail->full + tile, parity);
        uint4 v[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) v[i] = mine[i * THREADS];
        fold<E>(p, v, scale2);
    }
    for (int tile = whole; tile < tiles; ++tile) barrier_wait(mail->full + tile, parity);  // the rest, and empty ones
    for (; mine < data + slice.vectors; mine += THREADS) {
        const uint4 v[1] = {*mine};
        fold<E>(p, v, scale2);
    }
    return p;
}

template <class E>
DEVICE uint4 gradient(uint4 v, const Verdict& g, float scale2) {
    uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float x[2];
        E::unpack(word[i], x);
#pragma unroll
        for (int j = 0; j < E::PER_WORD; ++j) {
            const float y = floor_nan(fmaf(x[j], scale2, -g.m2));
            x[j] = fast_exp2(y) * fmaf(g.B, y, g.A);
        }
        word[i] = E::pack(x);
    }
    return {word[0], word[1], word[2], word[3]};
}

// Gradient of the slice from shared memory; release(tile) when this thread has used a tile
template <class E, class Release>
DEVICE void write_slice(const Slice<E>& slice, const uint4* data, uint4* to, const Verdict& g, float scale2, int tiles, Release release) {
    const int whole = slice.vectors / TILE, thread = thread_index();
    data += thread, to += thread;
    for (int tile = 0; tile < whole; ++tile, data += TILE, to += TILE) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) store_global(to + i * THREADS, gradient<E>(data[i * THREADS], g, scale2));
        release(tile);
    }
    for (int v = whole * TILE + thread; v < slice.vectors; v += THREADS, data += THREADS, to += THREADS)
        store_global(to, gradient<E>(*data, g, scale2));
#pragma unroll 1
    for (int tile = whole; tile < tiles; ++tile) release(tile);
}

// Zeros in `columns` elements from `address` on, by all blocks of the cluster together
template <class E>
DEVICE void write_zeros(uint64_t address, int columns, int rank, int blocks) {
    using Bits = typename E::Bits;
    const Cut cut = cut_row(address, columns, sizeof(Bits));
    uint4* body = reinterpret_cast<uint4*>(address + cut.head * sizeof(Bits));
    for (int v = rank * THREADS + thread_index(); v < cut.vectors; v += blocks * THREADS) store_global(body + v, uint4{0, 0, 0, 0});
    const int edge = rank == 0 ? edge_column(cut, columns, Slice<E>::VECTOR, thread_index()) : -1;
    if (edge >= 0) store_global(reinterpret_cast<Bits*>(address) + edge, Bits(0));
}

DEVICE Partial warp_merge(Partial p, int lanes) {
    for (int mask = lanes / 2; mask; mask /= 2) p = merge(p, shuffle_xor(p, mask));
    return p;
}

// The statistics of the whole row in lane 0 of warp 0, the same bits in every block.  `turn` alternates between rows.
DEVICE Partial merge_cluster(Partial p, Mail* mail, int turn, int rank, int blocks) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const Partial nothing{EMPTY, 0.f, 0.f, -INFINITY};
    p = warp_merge(p, 32);
    if (lane == 0) mail->part[warp] = p;
    block_sync();
    Partial* inbox = mail->inbox + turn * blocks;
    if (warp == 0) {
        p = warp_merge(lane < WARPS ? mail->part[lane] : nothing, WARPS);
        p = {shuffle(p.m2, 0), shuffle(p.s, 0), shuffle(p.t, 0), shuffle(p.z, 0)};  // lanes may differ in the last bit
        if (lane < blocks) store_in_block(inbox + rank, lane, p);
    }
    cluster_sync();
    return warp == 0 ? warp_merge(lane < blocks ? inbox[lane] : nothing, MAX_CLUSTER) : p;
}

template <class E>
DEVICE void cluster_loss(const Job& job) {
    using Bits = typename E::Bits;
    uint4* data = reinterpret_cast<uint4*>(shared_memory());
    Mail* mail = reinterpret_cast<Mail*>(data + job.slice_vectors);
    const int thread = thread_index(), rank = cluster_rank(), blocks = cluster_blocks();
    const int tiles = (job.slice_vectors + TILE - 1) / TILE;
    if (thread == 0) {
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) barrier_init(mail->full + tile);
        barrier_init_done();
    }
    if (thread < NUMBERS) mail->numbers[thread] = job.numbers[thread].at ? *job.numbers[thread].at : job.numbers[thread].value;
    cluster_sync();  // every block has begun: its shared memory may be written to

    const auto label_of = [&](int64_t row) { return row < job.tokens ? load_global(job.labels + row) : job.ignore_index; };
    const auto load_row = [&](int64_t row) {
        const Slice<E> slice(job, row, rank);
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) load_tile(slice, tile, data, mail);
    };
    int64_t row = cluster_index(), label = label_of(row);
    if (thread == 0 && label != job.ignore_index) load_row(row);
    uint32_t turn = 0;  // parity of the barriers' phase, too: one per row that is read

    for (int64_t next; row < job.tokens; row = next) {
        next = row + cluster_count();
        const int64_t next_label = label_of(next);
        const bool load_next = next_label != job.ignore_index;
        const uint64_t out = job.out ? uint64_t(job.out) + row * job.stride_out * sizeof(Bits) : 0;
        if (label == job.ignore_index) {
            block_sync();  // a slower warp may still use the row before
            if (thread == 0 && load_next) load_row(next);
            if (rank == 0 && thread < COLUMNS + Twin::METRICS) store_global(job.table + thread * job.tokens + row, 0.f);
            if (out) write_zeros<E>(out, job.width, rank, blocks);
        } else {
            Slice<E> slice(job, row, rank);
            const int64_t y = label - job.vocab_start;
            slice.deal(job, y, rank, blocks, thread);
            const Bits* logits = reinterpret_cast<const Bits*>(job.logits) + row * job.stride;
            const float edge = slice.edge >= 0 ? to_float<E>(load_global(logits + slice.edge)) : -INFINITY;
            const float* input = thread < INPUTS ? job.inputs[thread] : nullptr;
            const float my_input = input ? load_global(input + row) : 0.f;

            Partial p = read_slice(slice, data, mail, turn, tiles, job.scale2);
            const float edge_word[2] = {edge, -INFINITY}, no_word[2] = {-INFINITY, -INFINITY};
            const uint4 last[1] = {{E::pack(edge_word), E::pack(no_word), E::pack(no_word), E::pack(no_word)}};
            fold<E>(p, last, job.scale2);
            if (slice.label >= 0) p.z = to_float<E>(reinterpret_cast<const Bits*>(data)[slice.label]);
            if (slice.label_at_edge) p.z = edge;
            p = merge_cluster(p, mail, turn, rank, blocks);
            if (thread < 32) {
                float given[INPUTS], table[COLUMNS + Twin::METRICS];
                for (int i = 0; i < INPUTS; ++i) given[i] = shuffle(my_input, i);
                const Verdict verdict = finish_row<Twin>(job, p, label, mail->numbers, given, table);
                if (thread == 0) mail->verdict = verdict;
                if (thread == 0 && rank == 0)
                    for (int i = 0; i < COLUMNS + Twin::METRICS; ++i) store_global(job.table + i * job.tokens + row, table[i]);
            }
            block_sync();
            const Verdict g = mail->verdict;
            if (out && g.pushes) {
                const Slice<E> coming(job, load_next ? next : row, rank);
                const auto release = [&](int tile) {
                    if (!load_next) return;
                    block_sync();
                    if (thread == 0) load_tile(coming, tile, data, mail);
                };
                uint4* to = reinterpret_cast<uint4*>(out + slice.cut.head * sizeof(Bits)) + rank * job.slice_vectors;
                write_slice(slice, data, to, g, job.scale2, tiles, release);
                // the label's column, by the thread that wrote its vector: stores of one thread to one place keep their order
                Bits* dx = reinterpret_cast<Bits*>(out);
                const int first = slice.cut.head + rank * job.slice_vectors * Slice<E>::VECTOR;
                if (slice.label >= 0) store_global(dx + first + slice.label, from_float<E>(g.label));
                if (slice.edge >= 0) {
                    const float at = floor_nan(fmaf(edge, job.scale2, -g.m2));
                    store_global(dx + slice.edge, from_float<E>(slice.label_at_edge ? g.label : fast_exp2(at) * fmaf(g.B, at, g.A)));
                }
                write_zeros<E>(out + job.valid * sizeof(Bits), job.width - job.valid, rank, blocks);
            } else {
                if (thread == 0 && load_next) load_row(next);  // all threads have passed the block_sync behind their last read
                if (out) write_zeros<E>(out, job.width, rank, blocks);
            }
            turn ^= 1;
        }
        label = next_label;
    }
}

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(THREADS, 3) cluster_loss_kernel(const __grid_constant__ Job job) { cluster_loss<ELEMENT>(job); }
#include "cluster_launch.cuh"
#endif
