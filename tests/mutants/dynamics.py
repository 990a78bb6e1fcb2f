"""Faults that the studies of learning dynamics, or their judgement, would hide.  Rows of `make test-mutants`."""

from tests.plant import Mutant

"""Faults in the learning-dynamics studies and in the runner of configurations.  Rows of `make test-mutants`."""


DYNAMICS, D, RUNNER = "tests/test_dynamics.py", "benchmarks/dynamics/", "tests/test_run_configs.py"
MUTANTS = [
    Mutant("a part's share is divided by all positions", D + "learn.py", "(part.share / trained.sum())", "(part.share / trained.numel())", DYNAMICS + " -k share"),
    Mutant("the study's labels are not shifted", D + "learn.py", 'labels = made["ids"][:, 1:]', 'labels = made["ids"][:, :-1]', DYNAMICS + " -k share"),
    Mutant("a cached token stands at position 0", D + "model.py", "begin = caches[0].length if caches else 0", "begin = 0", DYNAMICS + " -k cache"),
    Mutant("held-out problems are trained on", D + "columns.py", "if (zlib.crc32(bytes(prompt)) % HELD_OUT_OF == 0) == held_out:", "if True:", DYNAMICS + " -k held_out"),
    Mutant("an answer counts without its end token", D + "columns.py", "expected = [*problem.result, END]", "expected = [*problem.result]", DYNAMICS + " -k judged_by"),
    Mutant("two standard errors are enough to show a claim", D + "study.py", '"shows" if mean > 3 * error', '"shows" if mean > 2 * error', DYNAMICS + " -k verdicts"),
    Mutant("an arm of other settings is taken from the folder", D + "study.py", '["settings"] == asked and ', '["settings"] != None and ', DYNAMICS + " -k other_settings"),
    Mutant("the SRFT study changes its own answers' weight too", D + "srft_stages.py", "torch.where(expert_T, taught_T, terms.weight)", "taught_T", DYNAMICS + " -k variant"),
    Mutant("the table's weight of phi is DFT's", "megatron_plugin/losses/chord.py", "weight_T = logp_T.exp() * -torch.expm1(logp_T)", "weight_T = logp_T.exp()", DYNAMICS + " -k table_goes"),
    Mutant("a failed run ends the list", "examples/run_configs.py", "        outcomes.append(outcome)\n", "        outcomes.append(outcome)\n        if outcome.code: break\n", RUNNER + " -k does_not_stop"),
    Mutant("common overrides win over a line's own", "examples/run_configs.py", "*common, *run.overrides]", "*run.overrides, *common]", RUNNER + " -k does_not_stop"),
    Mutant("a list with failures exits with 0", "examples/run_configs.py", "return int(any(outcome.code != 0 for outcome in outcomes))", "return 0", RUNNER + " -k does_not_stop"),
]
