"""`megatron-plugin realign` with a scripted model: files that any kill leaves usable, and what is found before an engine is started."""

import contextlib
import io
import json
import shutil
from collections import Counter

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_plugin import cli
from megatron_plugin.data import ConversationEncoder, load_tokenizer, parse_line, read_conversations, train_tokenizer, true_vocab_size
from megatron_plugin.hooks.weights.files import HFReader
from megatron_plugin.rollout.engine import EngineLostError
from megatron_plugin.trainer import hf_engine, hf_scorer, realigning
from megatron_plugin.trainer.realign_summary import Ticker
from tests.rollout.scripted import Scripted
from tests.rollout.vllm_models import make_model, weights_of

QUESTION = "What is {} + 1?"
FILES = ("outcomes.jsonl", "realigned.jsonl", "rejected.jsonl")
SCORES = ("logp", "entropy", "cll", "cll_above_0", "cll_below_minus_1", "cll_below_minus_3", "cll_below_minus_5")
LINES = [json.dumps({"question": QUESTION.format(i), "answer": f"It is {i + 1} é.\n#### {i + 1}"}, ensure_ascii=False) for i in range(8)]
LINES[2] = '{"question": "no answer here"}'
LINES[5] = json.dumps({"question": QUESTION.format(5), "answer": "I do not know."})
SAYS = dict(
    alone={QUESTION.format(i): f"own {i}\n#### {i + 1}" for i in (0, 3)},
    analysis=dict.fromkeys(map(QUESTION.format, (1, 4, 6)), "so # CoT"),
    hinted={QUESTION.format(1): "with help é\n#### 2", QUESTION.format(6): "more help\n#### 7"},
)
KINDS = ["own", "hinted", "rejected", "own", "rejected", "rejected", "hinted", "rejected"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Config and tokenizer: no engine is started here."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    train_tokenizer([QUESTION.format(1), "#### 3 # CoT reference answer question analysis é help own"] * 4, folder, vocab_size=300)
    model = make_model(folder, "llama", vocab_size=320, max_position_embeddings=2000, eos_token_id=[5, 2])  # 20 columns of padding
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def go(model_dir, tmp_path, monkeypatch):
    """go(*options, dies_after=None) -> (exit code, the scripted model): the command with --out OUT; the engine dies at its n-th batch of pairs."""
    (tmp_path / "x.jsonl").write_text("\n".join(LINES) + "\n", encoding="utf-8")

    def run(*options, dies_after=None, model=model_dir, data=tmp_path / "x.jsonl"):
        made = []

        @contextlib.contextmanager
        def decoder(self):
            scripted = Scripted(self.tokenizer, **SAYS)
            scripted.seen, draw = 0, scripted.run

            def counted(prompts):
                scripted.seen += 1
                if dies_after is not None and scripted.seen > dies_after:
                    raise EngineLostError("the engine died")
                return draw(prompts)

            scripted.run = counted
            made.append(scripted)
            yield scripted

        monkeypatch.setattr(realigning._Realigning, "_decoder", decoder)
        code = cli.main(["realign", str(data), str(model), "--out", str(tmp_path / "out"), "--concurrency", "1", *options])
        return code, made[0] if made else None

    return run


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_every_line_is_in_one_of_the_two_files(go, tmp_path, capsys):
    code, model = go()
    assert code == 0
    outcomes, kept, rejected = ([json.loads(line) for line in (tmp_path / "out" / name).read_text("utf-8").splitlines()] for name in FILES)
    assert [x["line"] for x in outcomes] == list(range(1, 9)) and [x["kind"] for x in outcomes] == KINDS
    assert [{key: value for key, value in x.items() if key not in SCORES} for x in kept] == [x["record"] for x in outcomes if x["kind"] != "rejected"]
    assert all(set(SCORES) < set(x) for x in kept) and rejected == [x for x in outcomes if x["kind"] == "rejected"]
    reasons = {x["line"]: x["reason"].partition(":")[0] for x in rejected}
    assert reasons == {3: "bad sample", 5: "not verified", 6: "no answer", 8: "no analysis"}
    back = read_conversations(tmp_path / "out" / "realigned.jsonl")
    assert [c.messages[-1].content for c in back] == ["own 0\n#### 1", "with help é\n#### 2", "own 3\n#### 4", "more help\n#### 7"]
    said = capsys.readouterr().out
    assert "8 samples: 2 own (25%), 2 hinted (25%), 4 rejected (50%)" in said and "rejected, 1 x no answer; first, line 6:" in said
    assert "hinted decoding ended by eos 3" in said and "tokens/s" in said
    mean = sum(x["cll"] for x in kept) / 4
    assert f"mean cll of an answer under the model: {mean:+.3f} nats" in said and "hinted, " in said
    assert "line 8 of 8: 2 own, 2 hinted, 4 rejected" in said
    assert model.options.end_ids and "never wrote" not in said


def test_the_scores_are_those_of_the_models_own_forward(go, model_dir, tmp_path, capsys):
    """In fp64, over the true vocabulary, of the answer's tokens as training will read them.  A second start scores nothing again."""
    go()
    encoder, model = ConversationEncoder(load_tokenizer(model_dir)), AutoModelForCausalLM.from_pretrained(model_dir).double()
    kept = (tmp_path / "out" / "realigned.jsonl").read_text("utf-8").splitlines()
    for line in kept:
        record = json.loads(line)
        sample = encoder.encode(parse_line(line))
        with torch.no_grad():
            logp = model(sample.tokens_T[None]).logits[0, :-1, : true_vocab_size(encoder.tokenizer)].log_softmax(-1)
        live = sample.labels_T[1:] != -100
        drawn, entropy = logp.gather(1, sample.tokens_T[1:, None])[live, 0], -(logp.exp() * logp).sum(-1)[live]
        for name, right in (("logp", drawn), ("entropy", entropy), ("cll", drawn + entropy), ("cll_above_0", (drawn + entropy > 0).double())):
            assert record[name] == pytest.approx(right.mean().item(), abs=2e-6), name  # written with 6 decimals; measured 6e-7
    capsys.readouterr()
    go()
    assert "by transformers" not in capsys.readouterr().out and (tmp_path / "out" / "realigned.jsonl").read_text("utf-8").splitlines() == kept
    shutil.rmtree(tmp_path / "out")
    assert go("--no-score")[0] == 0 and "mean cll" not in capsys.readouterr().out and not (tmp_path / "out" / "scores.jsonl").exists()


def test_scores_do_not_depend_on_how_many_rows_go_together(go, tmp_path, monkeypatch, capsys):
    go()
    kept = [json.loads(line) for line in (tmp_path / "out" / "realigned.jsonl").read_text("utf-8").splitlines()]
    longest = max(record["tokens"] for record in kept)
    monkeypatch.setattr(hf_scorer, "TOKENS", longest)  # each alone
    rows, forward = [], hf_scorer.HFScorer._forward
    monkeypatch.setattr(hf_scorer.HFScorer, "_forward", lambda self, samples: rows.append(len(samples)) or forward(self, samples))
    shutil.rmtree(tmp_path / "out")
    go()
    assert rows == [1] * 4
    for ours, theirs in zip(map(json.loads, (tmp_path / "out" / "realigned.jsonl").read_text("utf-8").splitlines()), kept, strict=True):
        assert all(ours[name] == pytest.approx(theirs[name], abs=2e-6) for name in SCORES)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.  Tried to allocate 80 GiB")

    monkeypatch.setattr(hf_scorer.HFScorer, "_forward", full)
    (tmp_path / "out" / "scores.jsonl").unlink()
    assert go()[0] == 12
    said = capsys.readouterr().err
    assert "realign: --no-score" in said and "Traceback" not in said


def test_scores_that_were_cut_off_are_taken_up_again(go, tmp_path):
    go()
    out = tmp_path / "out"
    whole, scores = (out / "realigned.jsonl").read_bytes(), (out / "scores.jsonl").read_bytes()
    for cut in (0, 40, scores.index(b"\n") + 1, len(scores) - 1):
        (out / "scores.jsonl").write_bytes(scores[:cut])
        go()
        assert (out / "scores.jsonl").read_bytes() == scores and (out / "realigned.jsonl").read_bytes() == whole


def test_scores_of_outcomes_that_were_removed_are_removed(go, tmp_path):
    go()
    out = tmp_path / "out"
    whole, scores = (out / "scores.jsonl").read_text(), (out / "scores.jsonl").read_text().replace('"cll": ', '"cll": 1')
    (out / "outcomes.jsonl").unlink()
    (out / "scores.jsonl").write_text(scores)
    go()
    assert (out / "scores.jsonl").read_text() == whole


def test_a_run_cut_off_anywhere_goes_on_without_losing_or_doubling_a_line(go, tmp_path):
    go()
    out = tmp_path / "out"
    whole = contents(out)
    text = whole["outcomes.jsonl"]
    for cut in [*range(0, len(text), 211), len(text) - 1, len(text)]:
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        (out / "outcomes.jsonl").write_bytes(text[:cut])
        code, model = go()
        assert code == 0 and contents(out) == whole
        done = text[:cut].count(b"\n")
        asked = {QUESTION.format(i) for i in range(done)} & {question for _, question, *_ in model.asked} if model else set()
        assert not asked, "a line that was done is not asked again"
    assert model is None, "nothing was left: no engine was started"


def test_an_engine_that_dies_leaves_what_was_done(go, tmp_path, capsys):
    code, _ = go(dies_after=1)
    assert code == 5 and "the engine died" in capsys.readouterr().err
    done = contents(tmp_path / "out")
    assert done["outcomes.jsonl"].count(b"\n") == 2 and done["realigned.jsonl"].count(b"\n") == 2, "one batch of two"
    assert go()[0] == 0
    assert "going on behind line 2" in capsys.readouterr().out
    whole = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    go()
    assert contents(tmp_path / "out") == whole


def test_more_samples_go_on_behind_fewer(go, tmp_path):
    assert go("--samples", "3")[0] == 0
    assert contents(tmp_path / "out")["outcomes.jsonl"].count(b"\n") == 3
    assert go("--concurrency", "4")[0] == 0, "how many at once is no other question"
    assert contents(tmp_path / "out")["outcomes.jsonl"].count(b"\n") == 8


def test_another_option_is_not_mixed_in(go, capsys):
    go("--samples", "1")
    code, model = go("--beta", "3")
    assert code == 4 and model is None
    assert "holds answers of something else (beta is 3.0, was 0.7): choose another --out" in capsys.readouterr().err


def test_a_splitter_that_never_comes_is_said(go, tmp_path, capsys, monkeypatch):
    draw = Scripted.run

    def without(self, prompts):
        run = draw(self, prompts)
        for key, sample in run.samples.items():
            run.samples[key] = type(sample)(**{**vars(sample), "split_at": None})
        return run

    monkeypatch.setattr(Scripted, "run", without)
    assert go("--splitter", "\\boxed{")[0] == 0
    assert "2 of 2 hinted answers never wrote '\\\\boxed{'" in capsys.readouterr().out
    assert go("--splitter", "", "--out", str(tmp_path / "other"))[0] == 0
    assert "never wrote" not in capsys.readouterr().out


def edited(model_dir, folder, **changes):
    """A copy with another tokenizer_config.json; None removes a key."""
    shutil.copytree(model_dir, folder)
    path = folder / "tokenizer_config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def test_a_tokenizer_without_an_end_or_a_template_or_too_large_is_refused(go, model_dir, tmp_path, capsys):
    assert hf_engine.end_ids(load_tokenizer(model_dir), model_dir) == (2, 5), "of tokenizer and config.json"
    endless = edited(model_dir, tmp_path / "endless", eos_token=None)
    assert hf_engine.end_ids(load_tokenizer(endless), endless) == (2, 5)
    (endless / "config.json").write_text(json.dumps({"max_position_embeddings": 99}))
    (endless / "generation_config.json").unlink()
    code, model = go("--out", str(tmp_path / "b"), model=endless)
    assert code == 2 and model is None and "without an end token, and none in generation_config.json" in capsys.readouterr().err
    (endless / "config.json").write_text(json.dumps({"max_position_embeddings": 99, "vocab_size": 250, "eos_token_id": 2}))
    code, model = go("--out", str(tmp_path / "d"), model=endless)
    assert code == 2 and model is None and "expected below vocab_size 250 of config.json" in capsys.readouterr().err
    bare = edited(model_dir, tmp_path / "bare", chat_template=None)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    code, model = go("--out", str(tmp_path / "c"), model=bare)
    assert code == 4 and model is None and "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("options, code, message", [
    (["--reward", "numerik"], 2, "did you mean 'numeric'"),
    (["--beta", "-1"], 2, "beta: got -1.0, expected a finite number of at least 0"),
    (["--temperature", "0.001"], 2, "expected 0 (greedy) or at least 0.01"),
])  # fmt: skip
def test_bad_options_are_found_before_the_engine_is_started(go, options, code, message, capsys):
    assert go(*options)[0] == code and message in capsys.readouterr().err


def test_data_of_which_nothing_is_left(go, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    assert go(data=tmp_path / "empty.jsonl")[0] == 4 and "got no line" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"question": "?"}\n' * 3)
    assert go("--out", str(tmp_path / "b"), data=tmp_path / "bad.jsonl")[0] == 4
    said = capsys.readouterr()
    assert "none of 3 samples was kept" in said.err and "rejected, 3 x bad sample; first, line 1:" in said.out


def test_on_a_terminal_there_is_a_bar(capsys):
    class Realigner:
        counts, tokens = Counter(own=3, rejected=1), 70

    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Ticker(8, 4, screen) as ticker:
        ticker.say(8, Realigner())
    shown = screen.file.getvalue()
    assert "8/8" in shown and "3 own, 0 hinted, 1 rejected" in shown and "tokens/s" in shown and not capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_that_are_sent_are_the_directorys(tmp_path, tied):
    """Without what some directories have besides: the head of tied weights, and frequencies that are computed."""
    model = make_model(tmp_path, "qwen2", tied=tied)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()} | extra, tmp_path / "model.safetensors")
    sent, expected = dict(hf_engine.weights_of(HFReader(tmp_path), tied=tied)), dict(weights_of(model))
    assert sent.keys() == expected.keys() and all(torch.equal(sent[name], expected[name]) for name in sent)
