"""Faults of what a run reports: metrics, operations, profiles, memory, trackers, and the arithmetic of docs/scale.md.  Rows of `make test-mutants`."""

from tests.plant import Mutant

T, S = "megatron_plugin/trainer/", "benchmarks/scale/"
LINE, TRACK, PERF, SCALE = ("tests/trainer/test_step_line.py", "tests/trainer/test_trackers.py", "tests/trainer/test_perf.py", "tests/benchmarks/test_scale.py")
MUTANTS = [
    Mutant("a step's line grows with its metrics", T + "step_line.py", "        cells.pop(name, None)\n", "        pass\n", LINE),
    Mutant("the bar moves the cursor", T + "metrics.py", "        bar.rstrip()\n", '        self._console.file.write("\\r\\x1b[2K")\n', f"{LINE} -k terminal"),
    Mutant("a service that is full holds training up", T + "trackers.py", "            self._steps.put_nowait((step, finite))", "            self._steps.put((step, finite), timeout=3)", f"{TRACK} -k hangs"),
    Mutant("a login of an address is told", T + "trackers.py", '    return LOGIN.sub(r"\\1***@", f"{type(error).__name__}: {first}")[:300]', '    return f"{type(error).__name__}: {first}"[:300]', f"{TRACK} -k said_once"),
    Mutant("secrets are sent", T + "trackers.py", "    values = yaml.safe_load(to_yaml(config))", "    values = __import__('dataclasses').asdict(config)", f"{TRACK} -k secret"),
    Mutant("the keys and values of an attention are not counted", T + "flops.py", "self.hidden * self.head * 2 * (self.heads + self.groups)  #", "self.hidden * self.head * 2 * (self.heads + 0 * self.groups)  #", f"{PERF} -k published"),
    Mutant("a part of a GPU has the whole peak", T + "perf.py", 'None if "MIG" in name else next(', "next(", f"{PERF} -k peak"),
    Mutant("running out of memory ends as any error", T + "loop.py", '        with memory_explained(config, lambda: f"step {run.step + 1}", run=run):', "        with contextlib.nullcontext():", f"{PERF} -k how_much"),
    Mutant("a trace replaces an older one", T + "profiling.py", "path.touch(exist_ok=False)", "path.touch()", f"{PERF} -k trace"),
    Mutant("training and its parts are counted twice", "megatron_plugin/report/run_page.py", '    if "forward and backward" not in inside:', "    if True:", "tests/report/test_run_page.py -k counted_once"),
    Mutant("the distributed optimizer shares nothing out", S + "model.py", "state / (layout.replicas if layout.distributed_optimizer else 1)", "state", f"{SCALE} -k page_has"),
    Mutant("the head's gradient is not all-reduced", S + "traffic.py", "head=sum(batch.through_head) * model.sizes.hidden * size * split * last", "head=0.0", f"{SCALE} -k small_runs"),
    Mutant("an engine's memory is the trainer's", T + "memory.py", '    if getattr(error, "exit_code", None) is not None:\n', "    if False:\n", f"{PERF} -k counts_as"),
    Mutant("memory that the driver refuses is any error", T + "memory.py", "any(sign in str(error) for sign in DEVICE)", "False", f"{PERF} -k counts_as"),
    Mutant("half of an odd number of rows is advised", T + "memory.py", "fewer = max(n for n in range(1, train.micro_batch) if train.micro_batch % n == 0)", "fewer = train.micro_batch // 2", f"{PERF} -k still_divide"),
    Mutant("a trace that cannot be ended ends the run", T + "profiling.py", "        try:\n            profile.stop()\n", "        profile.stop()\n        try:\n", f"{PERF} -k cannot_be_ended"),
    Mutant("a run that failed is finished at the service", T + "trackers.py", "finish(failed=self._run_failed)", "finish(failed=False)", f"{TRACK} -k how_the_run_ended"),
    Mutant("rows of a scoring pass are padded without bound", T + "hf_scorer.py", "max(1, min(self.rows, TOKENS // longest))", "self.rows", "tests/trainer/test_realigning.py -k go_together"),
]
