"""Drop-ins that need no framework to be installed: a forward_step with our loss in it, and Megatron-LM's --plugin-config.

In the frameworks themselves: tests/versions (Megatron-LM, verl) and test_dropins_trl.py."""

import argparse
import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from megatron_plugin.config import ConfigError
from megatron_plugin.config.plugin import load_plugin_config
from megatron_plugin.hooks.dropins import megatron_lm
from megatron_plugin.hooks.dropins.schedule import with_loss
from tests.spawn import on_ranks
from tests.tolerances import LAYOUT_GRAD, LAYOUT_LOSS

PAGE = Path(megatron_lm.__file__).parent / "README.md"


def _mean(reports):
    total = torch.stack([report["lm loss"] for report in reports]).double().sum(0)
    return float(total[0] / total[1])


@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)])
@pytest.mark.parametrize("per_token", [True, False])
def test_a_forward_step_with_our_loss(tensor, pipeline, per_token):
    """Their loss_func and their normalisation, our loss: DFT equals p x megatron-core's cross-entropy, whoever divides."""
    ranks = on_ranks(2, "tests.hooks.dropin_ranks", "steps", tensor=tensor, pipeline=pipeline, per_token=per_token)
    for rank, results in enumerate(ranks):
        stock, truth = results["stock"], results["by hand"]
        last = bool(truth[0])
        assert last == (rank == 1 or pipeline == 1) and truth[1].norm() > 1e-3
        for way in {"two-pass", "functor", "bridge", *(["one-pass"] if per_token else [])}:
            reports, gradient = results[way]
            assert (gradient - truth[1]).norm() <= LAYOUT_GRAD * truth[1].norm(), way
            if last:
                assert _mean(reports) == pytest.approx(_mean(truth[0]), rel=LAYOUT_LOSS), way
                assert {"lm loss", "nll", "token_prob", "entropy", "weight"} <= set(reports[0]), way
                nll = sum(float(report["nll"][0]) for report in reports) / sum(float(report["nll"][1]) for report in reports)
                assert nll == pytest.approx(_mean(stock[0]), rel=1e-5), "what is reported beside it is the plain cross-entropy"
        if pipeline == 1:
            plan, labels = results["refused"]
            assert plan.startswith("ValueError: got return_schedule_plan=True") and "output_processor=handle.output_processor" in plan
            assert labels.startswith("RuntimeError: forward_step(data_iterator, model) did not call its model with labels")
        again, gradient = results["detached"]
        assert torch.equal(gradient, stock[1]) and (not last or _mean(again) == _mean(stock[0]) and set(again[0]) == {"lm loss"})


def test_a_forward_step_without_a_model():
    with pytest.raises(ValueError, match=r"got forward_step\(data_iterator, net\), expected a parameter called 'model'"):
        with_loss(lambda data_iterator, net: None, "dft")


# ---------------------------------------------------------------- --plugin-config


@pytest.fixture
def parse(tmp_path):
    """parse(text of the file): the parsed arguments of a script with our extra_args_provider."""
    path = tmp_path / "plugin.yaml"

    def run(text):
        path.write_text(text)
        parser = megatron_lm.extra_args_provider(argparse.ArgumentParser(prog="pretrain_gpt.py"))
        return parser.parse_args(["--plugin-config", str(path)]).plugin_config

    return run


def test_the_file_becomes_options_of_attach(parse):
    loss = "loss: {name: gce, gamma: 0.5, entropy_bonus: 0.01}\n"
    path = parse(f"{loss}head: {{vocab_size: 37, softcap: 30}}\nplan:\n  logits_dtype: fp32\none_pass: true\n")
    assert isinstance(path, str), "Megatron-LM stores its arguments in checkpoints"
    options = megatron_lm.options_of(path)
    assert options["loss"].name == "gce" and options["loss"].params == {"gamma": 0.5} and options["loss"].regularisers == {"entropy_bonus": 0.01}
    assert (options["head"].vocab_size, options["head"].softcap, options["head"].temperature) == (37, 30.0, 1.0)
    assert options["plan"].logits_dtype == torch.float32 and options["plan"].chunk_tokens is None and options["one_pass"] is True
    empty = megatron_lm.options_of(parse("head:\n"))
    assert empty["loss"].name == "sft" and empty["one_pass"] is False


def test_without_it_there_is_none():
    assert megatron_lm.extra_args_provider(argparse.ArgumentParser()).parse_args([]).plugin_config is None


@pytest.mark.parametrize("text, message", [
    ("los: {name: dft}", "plugin.yaml:1: los: got an unknown key; did you mean 'loss'?"),
    ("loss: {name: dft}\nhead:\n  vocab: 3", "plugin.yaml:3: head.vocab: got an unknown key; did you mean 'head.vocab_size'?"),
    ("head: {vocab_size: many}", "plugin.yaml:1: head.vocab_size: got 'many', expected a whole number"),
    ("plan: {logits_dtype: fp64}", "plan.logits_dtype: got 'fp64', expected one of fp32, bf16"),
    ("plan: {main_grad: 1}", "plan.main_grad: got an unknown key"),
    ("one_pass: maybe", "one_pass: got 'maybe', expected true or false"),
    ("loss: dft", "loss: got 'dft', expected keys below it"),
    ("head: 3", "head: got 3, expected keys below it"),
    ("loss: {name: 3}", "loss.name: got 3, expected the name of a loss"),
    ("loss: {gamma: 1}", "loss 'sft' has no parameter 'gamma'"),
    ("loss: {name: dtf}", "plugin.yaml: loss: unknown loss 'dtf' (did you mean 'dft'?)"),
    ("loss: {name: gce, gama: 1}", "loss 'gce' has no parameter 'gama' (did you mean 'gamma'?)"),
    ("loss: {name: gce, gamma: -1}", "gamma"),
    ("- 1", "got a YAML list or a single value"),
    ("loss: {name: [", "got text that is no YAML"),
])  # fmt: skip
def test_mistakes_in_the_file_exit_2(parse, capsys, text, message):
    with pytest.raises(SystemExit) as stopped:
        parse(text)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "argument --plugin-config: " in error


def test_a_file_that_is_not_there_exits_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        megatron_lm.extra_args_provider(argparse.ArgumentParser()).parse_args(["--plugin-config", "nowhere.yaml"])
    assert stopped.value.code == 2 and "nowhere.yaml: cannot read the configuration" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        load_plugin_config("nowhere.yaml")


def test_its_loss_func_is_pretrain_gpts():
    per_token, mask = torch.randn(2, 5, requires_grad=True), (torch.rand(2, 5) > 0.4).float()
    total, count, report = megatron_lm.loss_func(mask, per_token, model=None)
    assert float(total.detach()) == pytest.approx(float((per_token * mask).sum().detach())) and total.requires_grad
    assert count.dtype == torch.int32 and int(count) == int(mask.sum()) and not count.requires_grad
    torch.testing.assert_close(report["lm loss"], torch.stack([total.detach(), count.float()]))


# ---------------------------------------------------------------- the page


def test_what_the_page_imports_exists():
    imported = set()
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("megatron_plugin"):
                imported |= {(node.module, alias.name) for alias in node.names}
    assert len(imported) >= 5
    for module, name in imported:
        found = import_module(module)
        assert hasattr(found, name) or import_module(f"{module}.{name}"), f"{module}.{name}"


def test_every_framework_says_what_was_read_and_what_was_run():
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
    names = [section.split("\n")[0] for section in sections]
    assert names == ["Megatron-LM", "Megatron-Bridge", "verl", "TRL", "slime", "NeMo-RL", "ms-swift"]
    for section in sections:
        assert re.search(r"^Read: .*@ `[0-9a-f]{12}`", section, re.M), section[:40]
        assert re.search(r"^Run: (not run|`(make test-versions|tests/))", section, re.M), section[:40]
        assert re.search(r"^Normalisation: ", section, re.M) and "```python" in section, section[:40]
