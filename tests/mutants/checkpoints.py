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
    Mutant("a nan is the best for ever", T + "saving.py", "return math.isfinite(value) and (kept", "return (kept", f"{SAVING} -k newest_and_the_best"),
    Mutant("a checkpoint that was being replaced is lost", T + "run.py", "    put_back(run_dir)\n", "", f"{SAVING} -k being_replaced"),
    Mutant("a newer version's checkpoint is renamed as damaged", T + "manifest.py", "        if _is_newer(parsed):", "        if False:", f"{SAVING} -k newer_version"),
    Mutant("a passing error of the disk costs a checkpoint its name", T + "manifest.py", "lasting=isinstance(error, FileNotFoundError)", "lasting=True", f"{SAVING} -k this_time"),
    Mutant("a full disk under metrics.jsonl ends training", T + "metrics.py", "        except OSError as error:\n            if not self.failed:", "        except KeyError as error:\n            if not self.failed:", "tests/faults/test_faults.py -k refused"),
    Mutant("a full disk under TensorBoard ends training", T + "metrics.py", "        except OSError as error:\n            self._board = None", "        except KeyError as error:\n            self._board = None", "tests/faults/test_faults.py -k refused"),
    Mutant("a full disk under rollouts.jsonl ends training", T + "rollouts.py", "        except OSError as error:\n            if not self.unlogged:", "        except KeyError as error:\n            if not self.unlogged:", "tests/trainer/test_rollouts.py -k one_leader_cannot_write"),
    Mutant("a damaged line of the metrics hides those after it", "megatron_plugin/report/lines.py", "    return [line for line in lines if", "    return [line for line in lines[:1] if", "tests/report/test_run_page.py -k damaged_line"),
    Mutant("a resumed run skips a row", "megatron_plugin/data/order.py", 'self.consumed = state["consumed"]', 'self.consumed = state["consumed"] + 1', "tests/faults/test_faults.py -k data_position"),
]
