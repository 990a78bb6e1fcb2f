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
    for (bool all_done = false; !all_done && !gpu.fault;) {
        const long before = gpu.events;
        all_done = true;
        const int start = random_bits() % n, step = random_bits() % 2 ? 1 : n - 1;
        const uint64_t mood = gpu.random >> 2;
        for (int k = 0, i = start; k < n && !gpu.fault; ++k, i = (i + step) % n) {
            if (gpu.fibers[i].done) continue;
            all_done = false;
            if (progress && (mood >> i / 32 % 31 & 3) == 0) continue;  // a quarter of the warps fall a round behind
            resume(gpu.fibers[i]);
        }
        for (size_t c = gpu.copies.size(); gpu.copies_land == SOMETIME && c-- > 0;)
            if (random_bits() % 16 == 0) land(c);
        if (!progress && gpu.events == before && !all_done) {
            if (gpu.copies.empty()) gpu.fault = DEADLOCK;
            else land(random_bits() % gpu.copies.size());
        }
        progress = gpu.events != before;
    }
    if (!gpu.copies.empty()) gpu.fault = DEADLOCK;  // a block ended with a copy into it under way
}

// Where to count elements read and written, per element of the two spans that begin at Job.logits and Job.out
extern "C" void emulator_setup(uint8_t* reads, int64_t elements, uint8_t* writes, int64_t elements_out, uint64_t seed, int copies_land) {
    gpu.reads = reads, gpu.writes = writes, gpu.elements = elements, gpu.elements_out = elements_out, gpu.random = seed;
    gpu.copies_land = static_cast<Land>(copies_land);
}

extern "C" int cluster_loss_prepare(int, int, int, int* clusters) {
    *clusters = 2;
    return 0;
}

extern "C" int cluster_loss_launch(const Job* given, int, int cluster, int clusters, int shared_bytes, void*) {
    if (!gpu.stacks) gpu.stacks = static_cast<char*>(aligned_alloc(4096, size_t(MAX_BLOCKS) * FIBERS_PER_BLOCK * STACK));
    job = *given;
    gpu.logits = uint64_t(job.logits), gpu.out = uint64_t(job.out), gpu.element_size = sizeof(ELEMENT::Bits);
    gpu.fault = NO_FAULT;
    gpu.copies.clear();
    gpu.clusters = clusters;
    for (gpu.cluster = 0; gpu.cluster < clusters && !gpu.fault; ++gpu.cluster) run_cluster(cluster, shared_bytes);
    return gpu.fault;
}

extern "C" const char* cluster_loss_error(int fault) {
    static const char* const names[] = {"", "deadlock", "read outside the logits", "written outside the gradient", "not aligned"};
    return names[fault];
}
