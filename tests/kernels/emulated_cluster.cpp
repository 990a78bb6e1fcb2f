// The C ABI of csrc/cluster_launch.cuh on a CPU: the kernel itself (cluster_loss.cu) over emulated_hopper.h.
#include "cluster_loss.cu"

static Job job;

static void fiber_main() {
    cluster_loss<ELEMENT>(job);
    current->done = true;
    ++gpu.events;
    _longjmp(scheduler, 1);
}

static void resume(Fiber& f) {
    current = &f;
    if (_setjmp(scheduler) != 0) return;
    if (f.started) _longjmp(f.jump, 1);
    f.started = true;
    setcontext(&f.context);
}

static void run_cluster(int blocks, int shared_bytes) {
    const int n = blocks * THREADS;
    gpu.blocks = blocks;
    gpu.shared.assign(blocks, std::vector<unsigned char>(shared_bytes, 0xff));  // NaN until written
    gpu.fibers.assign(n, {});
    gpu.lanes.assign(n, {});
    gpu.block_barrier.assign(blocks, {THREADS});
    gpu.warp_barrier.assign(n / 32, {32});
    gpu.cluster_barrier = {n};
    for (int i = 0; i < n; ++i) {
        Fiber& f = gpu.fibers[i];
        f.block = i / THREADS, f.thread = i % THREADS;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = gpu.stacks + size_t(i) * STACK;
        f.context.uc_stack.ss_size = STACK;
        makecontext(&f.context, fiber_main, 0);
    }
    bool progress = true;
    const bool fickle = random_bits() % 2;
    int sleepers = WARPS, asleep = random_bits() % blocks * WARPS;  // warps that get no turn as long as anybody else gets on: the greatest skew there can be
    for (bool all_done = false; !all_done && !gpu.fault;) {
        const long before = gpu.events;
        all_done = true;
        const int start = random_bits() % n, step = random_bits() % 2 ? 1 : n - 1;
        for (int k = 0, i = start; k < n && !gpu.fault; ++k, i = (i + step) % n) {
            if (gpu.fibers[i].done) continue;
            all_done = false;
            if (progress && i / 32 >= asleep && i / 32 < asleep + sleepers) continue;
            resume(gpu.fibers[i]);
        }
        for (size_t c = gpu.copies.size(); gpu.copies_land == SOMETIME && c-- > 0;)
            if (random_bits() % 16 == 0) land(c);
        if (!progress && gpu.events == before && !all_done) {
            if (gpu.copies.empty()) gpu.fault = DEADLOCK;
            else land(random_bits() % gpu.copies.size());
        }
        if (!progress || (fickle && random_bits() % 16 == 0)) {
            sleepers = random_bits() % 2 ? WARPS : 1;  // a block or a warp
            asleep = random_bits() % (n / 32) / sleepers * sleepers;
        }
        progress = gpu.events != before;
    }
    if (!gpu.copies.empty()) gpu.fault = DEADLOCK;  // a block ended with a copy into it under way
}

// Order of threads and landing of copies (enum Land) for the launches to come
extern "C" void emulator_setup(uint64_t seed, int copies_land, int clusters) {
    gpu.random = seed, gpu.copies_land = static_cast<Land>(copies_land), gpu.clusters = clusters;
}

// Per element of the spans that began at Job.logits and Job.out in the last launch: times read, times written
extern "C" void emulator_counts(uint8_t* reads, uint8_t* writes) {
    memcpy(reads, gpu.reads.data(), gpu.reads.size());
    memcpy(writes, gpu.writes.data(), gpu.writes.size());
}

extern "C" int cluster_loss_prepare(int, int, int, int* clusters) {
    *clusters = gpu.clusters;
    return 0;
}

extern "C" int cluster_loss_launch(const Job* given, int, int cluster, int clusters, int shared_bytes, void*) {
    if (!gpu.stacks) gpu.stacks = static_cast<char*>(aligned_alloc(4096, size_t(MAX_BLOCKS) * FIBERS_PER_BLOCK * STACK));
    job = *given;
    gpu.logits = uint64_t(job.logits), gpu.out = uint64_t(job.out), gpu.element_size = sizeof(ELEMENT::Bits);
    gpu.fault = NO_FAULT;
    gpu.copies.clear();
    gpu.reads.assign((job.tokens - 1) * job.stride + job.width, 0);
    gpu.writes.assign(job.out ? (job.tokens - 1) * job.stride_out + job.width : 0, 0);
    const int all = gpu.clusters;
    gpu.clusters = clusters;
    for (gpu.cluster = 0; gpu.cluster < clusters && !gpu.fault; ++gpu.cluster) run_cluster(cluster, shared_bytes);
    gpu.clusters = all;
    return gpu.fault;
}

extern "C" const char* cluster_loss_error(int fault) {
    static const char* const names[] = {"", "deadlock", "read outside the logits", "written outside the gradient", "not aligned",
                                        "a store into a block that does not run"};
    return names[fault];
}
