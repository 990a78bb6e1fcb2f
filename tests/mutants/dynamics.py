"""Faults in the learning-dynamics studies, in their judgement, and in the runner of configurations.  Rows of `make test-mutants`."""

from tests.plant import Mutant

DYNAMICS, RULES, D, RUNNER = "tests/test_dynamics.py", "tests/test_dynamics_rules.py", "benchmarks/dynamics/", "tests/test_run_configs.py"
MUTANTS = [
    Mutant("a part's share is divided by all positions", D + "learn.py", "(part.share / trained.sum())", "(part.share / trained.numel())", DYNAMICS + " -k share"),
    Mutant("the study's labels are not shifted", D + "learn.py", 'labels = made["ids"][:, 1:]', 'labels = made["ids"][:, :-1]', DYNAMICS + " -k share"),
    Mutant("a cached token stands at position 0", D + "model.py", "begin = caches[0].length if caches else 0", "begin = 0", DYNAMICS + " -k cache"),
    Mutant("held-out problems are trained on", D + "columns.py", "if (zlib.crc32(bytes(prompt)) % HELD_OUT_OF == 0) == held_out:", "if True:", DYNAMICS + " -k held_out"),
    Mutant("an answer counts without its end token", D + "columns.py", "expected = [*problem.result, END]", "expected = [*problem.result]", DYNAMICS + " -k judged_by"),
    Mutant("two standard errors are enough to show a claim", D + "study.py", '"shows" if mean > 3 * error', '"shows" if mean > 2 * error', DYNAMICS + " -k verdicts"),
    Mutant("an arm of other settings is taken from the folder", D + "study.py", '["settings"] == asked and ', '["settings"] != None and ', DYNAMICS + " -k other_settings"),
    Mutant("an arm of other code is taken from the folder", D + "study.py", 'kept["made"]["code"] == code_of_run(study.run)', 'kept["made"]["code"]', DYNAMICS + " -k other_settings"),
    Mutant("an arm's hash is of run's own lines only", D + "provenance.py", "todo += [part.id", "todo += [] and [part.id", RULES + " -k code_of_an_arm"),
    Mutant("the library is not in an arm's hash", D + "provenance.py", "for path in (*shared, *library)]", "for path in shared]", RULES + " -k code_of_an_arm"),
    Mutant("a dip is measured from the curve's lowest point", D + "chord_shift.py", 'less(bases, first["sft_then_rl"])', "[max(v for _, v in r['curve']['reward']) - min(v for _, v in r['curve']['reward']) for r in found['sft_then_rl']]", RULES + " -k by_construction"),
    Mutant("a curve is read one noted step late", D + "chord_shift.py", "if noted <= step][-1]", "if noted >= step][0]", RULES + " -k last_noted"),
    Mutant("the mean over a run counts points, not steps", D + "chord_entropy.py", "area = sum((b - a) * (x + y) / 2", "area = sum((curve[-1][0] - curve[0][0]) / (len(curve) - 1) * (x + y) / 2", RULES + " -k mean_over_a_run"),
    Mutant("the page calls every run its own code", D + "page.py", 'made["code"] == document.get("codes", {}).get(arm, document["code"]) else', 'made["code"] else', RULES + " -k which_tree"),
    Mutant("the SRFT study changes its own answers' weight too", D + "srft_stages.py", "torch.where(expert_T, taught_T, terms.weight)", "taught_T", DYNAMICS + " -k variant"),
    Mutant("the table's weight of phi is DFT's", "megatron_plugin/losses/chord.py", "weight_T = logp_T.exp() * -torch.expm1(logp_T)", "weight_T = logp_T.exp()", DYNAMICS + " -k table_goes"),
    Mutant("a failed run ends the list", "examples/run_configs.py", "        outcomes.append(outcome)\n", "        outcomes.append(outcome)\n        if outcome.code: break\n", RUNNER + " -k does_not_stop"),
    Mutant("common overrides win over a line's own", "examples/run_configs.py", "*common, *run.overrides]", "*run.overrides, *common]", RUNNER + " -k does_not_stop"),
    Mutant("a list with failures exits with 0", "examples/run_configs.py", "return int(any(outcome.code != 0 for outcome in outcomes))", "return 0", RUNNER + " -k does_not_stop"),
]
