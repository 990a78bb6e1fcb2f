"""`megatron-plugin bench` and what doctor says of features and of a vocabulary."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_plugin import cli
from megatron_plugin.cli import features


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_bench_measures_every_op_against_the_truth(capsys, tmp_path):
    assert cli.main(["bench", "--quick", "--device", "cpu", "--out", "deep/b.json"]) == 0
    document = json.loads((tmp_path / "deep/b.json").read_text())
    assert {row["op"] for row in document["rows"]} == {"stats", "token_loss", "linear_token_loss"}
    for row in document["rows"]:
        assert row["ms"] > 0 and 0 < max(row["errors"].values()) < 1e-3 and not row["reason"], row
    assert {row["contender"] for row in document["rows"]} == {"ours", "ours, two-pass", "eager"}
    assert document["environment"]["versions"]["torch"] and document["environment"]["cpu"] and document["options"]["quick"]
    out = capsys.readouterr().out
    assert "linear_token_loss" in out and "say nothing about speed" in out and "deep/b.json" in out


def test_bench_takes_sizes_and_leaves_ops_out(capsys, tmp_path):
    assert cli.main(["bench", "--quick", "--ops", "stats", "--tokens", "7", "--vocab", "301", "--dtype", "bf16", "--device", "cpu"]) == 0
    (mine, eager) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert (mine["T"], mine["V"], mine["dtype"], mine["op"], eager["contender"]) == (7, 301, "bf16", "stats", "eager")


def test_bench_compares_with_torch_compile_unless_told_not_to():
    from megatron_plugin.bench.run import OPS

    for op in OPS.values():
        names = [contender.name for contender in op.contenders(True)]
        assert names[0] == "ours" and names[-1] == "torch.compile" and [c.name for c in op.contenders(False)] == names[:-1]


def test_bench_says_that_an_op_of_ours_is_wrong(monkeypatch, capsys, tmp_path):
    from megatron_plugin.bench import run
    from megatron_plugin.bench.harness import SPENT, Contender, Run

    right = run.ours.stats()

    def wrong(case):
        return Run(lambda state: {name: output + 1 for name, output in right(case).call(state).items()})

    row = run.OPS["stats"]
    monkeypatch.setitem(run.OPS, "stats", row._replace(contenders=lambda compiled: [Contender("ours", wrong), *row.contenders(compiled)[1:]]))
    words = ["bench", "--quick", "--ops", "stats", "--device", "cpu"]
    assert cli.main(words) == 1
    said = capsys.readouterr()
    assert "error: got stats, ours: refused, wrong output: logp" in said.err and len(said.err.splitlines()) == 1
    assert "are right here" not in said.out and json.loads((tmp_path / "bench.json").read_text())["rows"][0]["reason"]
    monkeypatch.setattr(run, "compare", lambda *_, **__: [{"contender": "ours", "shape": "", "ms": None, "reason": SPENT}])
    assert cli.main(words) == 0 and "are right here" not in capsys.readouterr().out, "not tried: neither right nor wrong"


def test_bench_offers_the_ops_there_are():
    from megatron_plugin.bench.run import OPS
    from megatron_plugin.cli import machine_commands

    assert machine_commands.OPS == tuple(OPS)


def test_the_rewards_that_are_known_early_are_those_there_are():
    from megatron_plugin.cli import prechecks
    from megatron_plugin.rollout import rewards

    assert prechecks.REWARDS == rewards.REWARDS


def test_bench_refuses_what_does_not_fit(capsys):
    assert cli.main(["bench", "--device", "cpu", "--tokens", "100000000"]) == 2
    assert "GiB; take fewer --tokens" in capsys.readouterr().err
    import torch

    if not torch.cuda.is_available():
        assert cli.main(["bench", "--device", "cuda"]) == 2
        assert "torch finds no GPU here" in capsys.readouterr().err


def test_the_features_are_those_promised_and_each_says_what_adds_it(monkeypatch):
    assert list(features.FEATURES) == ["ops on a CPU", "Triton kernels", "training", "import, export", "on-policy, serve", "realign, eval's answers",
                                       "verified answers", "reports, curves", "W&B", "MLflow", "GPU", "NCCL"]  # fmt: skip
    monkeypatch.setattr(features, "there", lambda module: module not in ("psutil", "vllm", "wandb", "math_verify"))
    found = {row.name: row for row in features.rows()}
    assert found["training"].missing == ("psutil",) and found["training"].text == "missing: psutil; pip install '.[cpu]'   (in a checkout)"
    assert "vllm==0.32.0" in found["on-policy, serve"].text and found["W&B"].text.endswith("pip install wandb")
    assert found["ops on a CPU"].text.startswith("yes: torch 2.")


def distributions(words: list[str], project: dict) -> set[str]:
    """What pip would be told to install: the words, and for '.[extra]' the project's dependencies with those of its extras."""
    extras, found, left = project["optional-dependencies"], set(), list(words)
    while left:
        name, extra = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", left.pop()).groups()
        if name in (".", "megatron-plugin"):
            left += [*project["dependencies"], *(requirement for part in extra.split(",") for requirement in extras[part])]
        found.add(name)
    return found


@pytest.mark.parametrize("name", features.FEATURES)
def test_what_adds_a_feature_adds_all_of_it(name):
    tomllib = pytest.importorskip("tomllib")
    feature = features.FEATURES[name]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    added = distributions(shlex.split(feature.pip.partition("   (")[0]), project)
    for module in feature.modules:
        assert added & {*features.DISTRIBUTIONS.get(module, ()), module.replace("_", "-")}, module


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from megatron_plugin.data import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(["a b c " * 50], folder, vocab_size=270)
    return folder


def test_the_vocabulary_fit(tokenizer, capsys, tmp_path):
    model = "model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4}\nparallel: {tensor: 2}\n"
    (tmp_path / "x.yaml").write_text(f"{model}data: {{tokenizer: {tokenizer}}}\n")
    assert cli.main(["doctor", "--config", "x.yaml"]) == 0
    out = capsys.readouterr().out
    size = int(out.split(" ids")[0].split()[-1])
    assert 263 <= size <= 270 and "; 7 are control tokens" in out and "eos: '<|eos|>'" in out
    assert f"384 rows of the embedding, 192 on each of 2 tensor-parallel ranks (a multiple of 128); {384 - size} are padding" in out
    assert cli.main(["doctor", "--tokenizer", str(tokenizer)]) == 0 and "model:" not in capsys.readouterr().out


def test_a_vocabulary_that_does_not_fit(tokenizer, capsys, tmp_path):
    import shutil

    folder = tmp_path / "t"
    shutil.copytree(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100, "model_type": "llama"}))
    for template in folder.glob("chat_template*"):
        template.unlink()
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    assert cli.main(["doctor", "--tokenizer", str(folder)]) == 2
    said = capsys.readouterr()
    assert "BROKEN  chat template: none" in said.out and "BROKEN  config.json: vocab_size 100, but ids go up to" in said.out
    assert "2 of the lines above say BROKEN" in said.err
