"""Faults of the guard of a step, of signals and labels.  Rows of `make test-mutants`."""

from tests.plant import Mutant

GUARD, BAD_INPUT, NONFINITE, PREEMPT = "tests/trainer/test_guard.py", "tests/trainer/test_bad_input.py", "tests/faults/test_faults.py -k nonfinite", "tests/faults/test_faults.py -k preemption"
T = "megatron_plugin/trainer/"
MUTANTS = [
    Mutant("a step that is not a number is applied", T + "update.py", "if verdict.finite and not (verdict.spike", "if not (verdict.spike", NONFINITE),
    Mutant("a rank's own gradient has no vote", T + "guard.py", "return Votes([float(lost), self._gradient_lost(),", "return Votes([float(lost), 0.0 * self._gradient_lost(),", NONFINITE),
    Mutant("the votes are not shared", T + "guard.py", "        dist.all_reduce(votes, op=dist.ReduceOp.MAX)  # with NCCL the host goes on at once\n", "", NONFINITE),
    Mutant("a held-back step does not count", T + "update.py", "    run.step += 1\n", "    run.step += verdict.finite\n", NONFINITE),
    Mutant("a sound step between does not reset the count", T + "guard.py", "            self.in_a_row = 0\n", "            pass\n", NONFINITE),
    Mutant("the vote waits for the device", T + "guard.py", "        spike = not lost and any(", "        float(self._gradient_lost())\n        spike = not lost and any(", GUARD),
    Mutant("masked strays are counted", T + "guard.py", "stray = live & (batch.labels", "stray = (batch.labels", GUARD),
    Mutant("a label in the padding passes", T + "labels.py", "(labels_T >= vocab_size)", "(labels_T > vocab_size)", GUARD),
    Mutant("spikes are left out of the median", T + "spikes.py", "        self.seen.append(value)", "        if not self.is_spike(value):\n            self.seen.append(value)", GUARD),
    Mutant("the first steps are judged", T + "spikes.py", "if not self.factor or len(self.seen) < LEAST:", "if not self.factor or not self.seen:", GUARD),
    Mutant("a resumed run has forgotten its losses", T + "guard.py", 'saved = (run.position or {}).pop("guard", None) or {}', 'saved = (run.position or {}).pop("guard", None) and {} or {}', GUARD),
    Mutant("torchrun's second Ctrl-C ends the run unsaved", T + "signals.py", " and time.monotonic() - _since > ONE_CTRL_C_S", "", GUARD),
    Mutant("a rollout is waited for after SIGTERM", T + "signals.py", "    if _breaking:\n", "    if _breaking and not number:\n", GUARD),
    Mutant("SIGTERM kills the queue of megatron-core's writers", "megatron_plugin/hooks/held_signals.py", "    resource_tracker.ensure_running()", "    pass", PREEMPT),
    Mutant("the last step is not saved after SIGTERM", T + "loop.py", "            if last or stop or (", "            if last or (", PREEMPT),
]
