"""Faults of commands and configuration.  Rows of `make test-mutants`."""

from tests.plant import Mutant

MUTANTS = [
    Mutant("an alias and our key that differ are both taken", "megatron_plugin/config/aliases.py", "wrong += [_two(name, value, spelled.get(alias.key, alias.key), own, where)] if own != value else []", "pass", "tests/config/test_aliases.py"),
    Mutant("bf16=true is fp32", "megatron_plugin/config/aliases.py", 'return "bf16" if _switch(value) else "fp32"', 'return "fp32" if _switch(value) else "bf16"', "tests/config/test_aliases.py"),
    Mutant("--smoke goes over what the command line says", "megatron_plugin/config/smoke.py", "if key in given or value == _now(config, key):", "if value == _now(config, key):", "tests/config/test_smoke.py"),
    Mutant("--smoke removes a directory that no smoke run made", "megatron_plugin/config/smoke.py", "if _is_strange(folder) and _is_strange(folder):", "if False:", "tests/config/test_smoke.py"),
    Mutant("--smoke keeps a layout for more ranks than there are", "megatron_plugin/config/smoke.py", 'else math.gcd(size, left)', 'else size', "tests/config/test_smoke.py"),
    Mutant("a metric that no evaluation has can be the best", "megatron_plugin/config/checks.py", "config.checkpoint.best not in metrics:", "not config.checkpoint.best.startswith('eval/'):", "tests/config/test_loss_fields.py"),
    Mutant("parameters of policy-gradient losses are forgotten", "megatron_plugin/config/loss_fields.py", 'if any("with_rollout_options" in ast.dump(decorator) for decorator in definition.decorator_list):', "if False:", "tests/config/test_loss_fields.py"),
    Mutant("doctor does not say what it did not check", "megatron_plugin/doctor.py", "    if encoder is None:\n        print(", "    if False:\n        print(", "tests/test_doctor.py"),
    Mutant("options stand between the file and its overrides", "megatron_plugin/cli/arguments.py", 'return sorted([*rest, *overrides], key=lambda word: word.startswith("-"))', 'return [*rest, *overrides]', "tests/config/test_aliases.py -k every_order"),
    Mutant("a field that is true or false swallows the next word", "megatron_plugin/config/aliases.py", "not accepts(field, True) or", "True or", "tests/config/test_aliases.py -k switch_leaves"),
    Mutant("a bare word becomes a truth value", "megatron_plugin/config/keys.py", "kind in (str, list[str]) and", "False and", "tests/config/test_aliases.py -k bare_word"),
    Mutant("--smoke removes what another machine has just made", "megatron_plugin/config/smoke.py", 'folder.rename(folder.with_name(f".{folder.name}.{uuid.uuid4().hex}"))', "folder", "tests/config/test_smoke.py -k at_once"),
    Mutant("a wrong op of ours leaves bench at exit code 0", "megatron_plugin/bench/run.py", 'if row["reason"] != SPENT]:', 'if row["reason"] == SPENT]:', "tests/cli/test_machine.py -k ours_is_wrong"),
    Mutant("a run_dir that cannot be written is found by training", "megatron_plugin/config/checks.py", 'check_folder(config.run_dir, "run_dir"', 'check_folder(".", "run_dir"', "tests/cli/test_mistakes.py -k proc"),
    Mutant("doctor's remedy for on-policy training leaves megatron-core out", "megatron_plugin/cli/features.py", "'.[cpu,rollout]' vllm", "'.[rollout]' vllm", "tests/cli/test_machine.py -k adds_a_feature"),
]
