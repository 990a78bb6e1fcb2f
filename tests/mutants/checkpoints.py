"""Faults of saving, checking and resuming.  Rows of `make test-mutants`."""

from tests.plant import Mutant

T, SAVING, PICKLES = "megatron_plugin/trainer/", "tests/trainer/test_saving.py", "tests/hooks/test_checkpoint_pickles.py"
DAMAGE = "tests/faults/test_faults.py -k checkpoint_damage"
MUTANTS = [
    Mutant("a checkpoint has no manifest", T + "saving.py", "write_manifest(folder, files | digests(rest))", "digests(rest)", f"{SAVING} -k asynchronous"),
    Mutant("files are not synced before the rename", T + "manifest.py", "os.fsync(file.fileno())  # of the file, whoever wrote it", "pass", f"{SAVING} -k everything_is_on_disk"),
    Mutant("the directory's new name is not synced", T + "saving.py", "        sync_folder(self.folder)\n", "", f"{SAVING} -k everything_is_on_disk"),
    Mutant("hashes are not compared", T + "manifest.py", "if digest(path) != expected:", "if False:", DAMAGE),
    Mutant("the manifest itself may be edited", T + "manifest.py", "if text != _text(files) or", "if", DAMAGE),
    Mutant("an asynchronous save sees the next step's weights", T + "saving.py", "copied = self.asynchronous", "copied = False", f"{SAVING} -k asynchronous"),
    Mutant("the best checkpoint is removed with the old ones", T + "saving.py", 'if best is None or checkpoint.name != best["checkpoint"]:', "if True:", f"{SAVING} -k newest_and_the_best"),
    Mutant("a higher metric is better, also of nll", T + "saving.py", 'higher = not self.best.endswith(("nll", "loss"))', "higher = True", f"{SAVING} -k newest_and_the_best"),
    Mutant("a checkpoint is lost by a kill before `latest` is moved", T + "checkpoint.py", "p.name == named or _written(p) > moved", "p.name == named", f"{SAVING} -k resume_tries"),
    Mutant("what an abandoned course has left is resumed", T + "checkpoint.py", "return [*fresh, *earlier,", "return found or [*fresh, *earlier,", f"{SAVING} -k resume_tries"),
    Mutant("saves may fail for ever", T + "saving.py", "self._in_a_row += 1", "pass", f"{SAVING} -k third_failure"),
    Mutant("a failed writer thread is not noticed", T + "saving.py", "problem = next((problem for problem, _ in votes if problem), None)", "problem = None", f"{SAVING} -k asynchronous"),
    Mutant("objects in a checkpoint are unpickled freely", "megatron_plugin/hooks/checkpoint_pickles.py", "weights_only=True)\n    except", "weights_only=False)\n    except", PICKLES),
    Mutant("what torch's metadata module has imported may be unpickled", "megatron_plugin/hooks/checkpoint_pickles.py", 'if MODULES[module] is None and getattr(found, "__module__", None) != module:', "if False:", PICKLES),
    Mutant("weights of another rotary base are taken", T + "changes.py", "saved[name] != ours[name]", "False", f"{SAVING} -k refused"),
    Mutant("the batch behind a checkpoint is drawn with older weights", T + "rollouts.py", "any(n and after // n > step // n for n in intervals)", "False", "tests/trainer/test_rollouts.py -k ahead_of_a_checkpoint"),
    Mutant("a resumed run skips a row", "megatron_plugin/data/order.py", 'self.consumed = state["consumed"]', 'self.consumed = state["consumed"] + 1', "tests/faults/test_faults.py -k data_position"),
]
