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
    Mutant("a rollout is waited for after SIGTERM", T + "signals.py", "    if _breaking and first:", "    if _breaking and not number:", GUARD),
    Mutant("SIGTERM kills the queue of megatron-core's writers", "megatron_plugin/hooks/held_signals.py", "    resource_tracker.ensure_running()", "    pass", PREEMPT),
    Mutant("a failed save passes for one after SIGTERM", T + "loop.py", "        done = run.step in (run.saver.saved, self.began_at)", "        done = True", f"{GUARD} -k finds_unsaved"),
    Mutant("any error after a signal is a stop", T + "loop.py", "signals.asked() and done and is_lost_peer(error)", "signals.asked() and done", f"{GUARD} -k error_of_its_own"),
    Mutant("checkpoints are written amid steps that are not numbers", T + "loop.py", " and not self.source.guard.in_a_row", "", f"{BAD_INPUT} -k loss_that_is_not"),
    Mutant("a replay file that fails ends the run", T + "replay.py", "    except (OSError, SafetensorError) as error:", "    except OSError as error:", f"{BAD_INPUT} -k cannot_be_kept"),
    Mutant("every rank makes the replay folder", T + "replay.py", 'if not exchange(own["rank"] == 0 and _made(folder))[0]:', "if not exchange(_made(folder))[0]:", f"{BAD_INPUT} -k one_rank_counts"),
    Mutant("a second signal breaks off the last save", T + "signals.py", "    if _breaking and first:", "    if _breaking:", f"{GUARD} -k second_signal"),
    Mutant("a signal's mark outlives its run", T + "signals.py", "    _asked, _breaking = 0, False", "    _asked = 0", f"{GUARD} -k second_signal"),
    Mutant("a chunk without the head is not watched on the last rank", T + "guard.py", "enumerate(run.chunks[:-1] if run.handle.active else run.chunks)", "enumerate(() if run.handle.active else run.chunks)", f"{GUARD} -k interleaved"),
    Mutant("chunk calls are taken for micro-batches", T + "guard.py", "self.outputs.setdefault(number, [])", "self.outputs.setdefault(0, [])", f"{GUARD} -k interleaved"),
    Mutant("a stopped rank waits for the others", "megatron_plugin/cli/__init__.py", "    elif not expected:\n", "    else:\n", "tests/test_cli.py -k waits_for_nobody"),
    Mutant("the last step is not saved after SIGTERM", T + "loop.py", "            if last or stop or due:", "            if last or due:", PREEMPT),
]
