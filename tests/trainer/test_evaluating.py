"""`megatron-plugin eval` as a person starts it: a real vLLM with the directory's weights, and a checkpoint under torchrun."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch

from megatron_plugin import cli
from megatron_plugin.data import ConversationEncoder, generate, parse_line, train_tokenizer, true_vocab_size
from megatron_plugin.trainer import evaluating
from tests.rollout.vllm_models import make_model
from tests.spawn import ROOT, on_ranks

MAX_TOKENS = 10
LINES = [json.dumps({"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"}) for i in range(6)] + ['{"question": "cut'] \
    + [json.dumps({"question": "long " * 400, "answer": "#### 1"})]  # fmt: skip
OPTIONS = ("--reward", "tests.rollout.user_rewards.length", "--max-tokens", str(MAX_TOKENS), "--n", "3", "--context", "256")


@pytest.fixture
def never_started(monkeypatch):
    @contextlib.contextmanager
    def refuse(options, start):
        raise AssertionError("vLLM was started, with nothing to ask")
        yield

    monkeypatch.setattr(evaluating, "started", refuse)


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, vllm):
    """(directory with x.jsonl, hf/ and out/, the model) after one evaluation."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = train_tokenizer(["What is 1 + 2? #### 3 long"] * 4, folder / "hf", vocab_size=300)
    model = make_model(folder / "hf", "llama", vocab_size=true_vocab_size(tokenizer), eos_token_id=list(range(20, 260, 9)))
    model.save_pretrained(folder / "hf")
    (folder / "x.jsonl").write_text("\n".join(LINES) + "\n")
    assert cli.main(["eval", str(folder / "x.jsonl"), str(folder / "hf"), "--out", str(folder / "out"), *OPTIONS]) == 0
    return folder, model, tokenizer


def test_greedy_answers_are_those_of_the_directorys_weights(evaluated):
    folder, model, tokenizer = evaluated
    encoder, ends = ConversationEncoder(tokenizer), {*range(20, 260, 9), tokenizer.eos_token_id}
    answers = lines(folder / "out" / "answers.jsonl")
    assert [answer["line"] for answer in answers] == list(range(1, 7)), "the cut line and the long question cannot be asked"
    for text, answer in zip(LINES, answers, strict=False):
        ids, said = encoder.prompt(parse_line(text)), []
        while len(said) < MAX_TOKENS and not (said and said[-1] in ends):
            with torch.no_grad():
                said.append(int(model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
        assert answer["greedy"]["text"] == tokenizer.decode(said, skip_special_tokens=True) and answer["greedy"]["tokens"] == len(said)
        assert answer["greedy"]["finish"] == ("stop" if said[-1] in ends else "length")
        assert len(answer["sampled"]) == 3
    assert len({answer["text"] for line in answers for answer in line["sampled"]}) > 6, "drawn at temperature 1, each with a seed of its own"


def test_numbers_and_page(evaluated):
    folder, *_ = evaluated
    numbers = json.loads((folder / "out" / "numbers.json").read_text())
    right = [[answer["right"] for answer in line["sampled"]] for line in lines(folder / "out" / "answers.jsonl")]
    assert numbers["mean@3"][0] == pytest.approx(sum(map(sum, right)) / 18) and numbers["pass@3"][0] == pytest.approx(sum(map(any, right)) / 6)
    assert {"greedy, right", "pass@1", "pass@2", "tokens of an answer", "cut off", "nll", "cll"} <= set(numbers)
    assert numbers["questions"] == [6, None] and numbers["lines left out"] == [2, None], "the cut line and the long question"
    page = (folder / "out" / "report.html").read_text().replace("\\", "")
    assert "pass@3" in page and "1 left out as too long; 1 lines cannot be used" in page


def test_what_is_done_is_not_done_again_nor_mixed_with_something_else(evaluated, never_started, capsys):
    folder, *_ = evaluated
    before = (folder / "out" / "answers.jsonl").read_bytes()
    command = ["eval", str(folder / "x.jsonl"), str(folder / "hf"), "--out", str(folder / "out"), *OPTIONS]
    assert cli.main(command) == 0 and (folder / "out" / "answers.jsonl").read_bytes() == before
    assert cli.main([*command, "--temperature", "0.5"]) == 4 and "temperature is 0.5, was 1.0" in capsys.readouterr().err


@pytest.mark.parametrize("words, code, message", [
    (["nowhere"], 3, "nowhere"), (["HF", "parallel.tensor=2"], 2, "which one process scores"),
    (["HF", "--reward", "nonsense"], 2, "nonsense"), (["HF", "--top-p", "0"], 2, "top_p"), (["HF", "--top-p", "1.5"], 2, "--top-p"),
    (["HF", "--temperature", "0"], 2, "--temperature"), (["HF", "--temperature", "nan"], 2, "--temperature"), (["HF", "--max-tokens", "9999"], 4, "no prompt to sample from"),
])  # fmt: skip
def test_what_is_refused_before_vllm_is_started(evaluated, never_started, tmp_path, capsys, words, code, message):
    folder, *_ = evaluated
    words = [str(folder / "hf") if word == "HF" else word for word in words]
    assert cli.main(["eval", str(folder / "x.jsonl"), *words, "--out", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err


@pytest.mark.torchrun
def test_a_checkpoint_under_torchrun_without_answers(tmp_path, problems):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in generate("train", 6, seed=5)))
    small = {"train.steps": 2, "train.warmup_steps": 0, "train.eval_interval": 0, "train.global_batch": 4, "train.micro_batch": 2, "data.eval_answers": 0, "model.gated_linear_unit": "true",
             "model.activation_func": "silu"}  # fmt: skip
    on_ranks(1, "tests.trainer.ranks", "train", overrides=problems | small | {"run_dir": tmp_path / "run"})
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatron_plugin.cli", "eval", str(tmp_path / "few.jsonl"),
             str(tmp_path / "run"), "parallel.tensor=2", "--no-answers", "--out", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert set(numbers) == {"nll", "cll"} and 3 < numbers["nll"][0] < 8 and done.stdout.count("nll, cll") == 1
    run = [sys.executable, "-m", "megatron_plugin.cli", "export", str(tmp_path / "run"), str(tmp_path / "hf")]
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True, timeout=100)
    assert cli.main(["eval", str(tmp_path / "few.jsonl"), str(tmp_path / "hf"), "--no-answers", "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "numbers.json").read_text())
    for name, (mean, _) in numbers.items():
        assert again[name][0] == pytest.approx(mean, abs=1e-5), "transformers says of the export what the checkpoint said"  # nats; measured 1e-6
