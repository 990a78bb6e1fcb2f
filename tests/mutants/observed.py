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
]
