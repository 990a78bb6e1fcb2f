"""`megatron-plugin import` and `export` around real training: the directory that comes out is the trained model."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from megatron_plugin.data import generate, load_tokenizer, train_tokenizer, true_vocab_size
from tests import tolerances as tol
from tests.hooks import hf_models
from tests.hooks.hf_models import same, tensors_in
from tests.spawn import ROOT, on_ranks

RANKS = "tests.hooks.weights_ranks"

ROWS = 500  # of the embedding; the tokenizer's 320 fill 384 by megatron-core's usual padding


def save_with_tokenizer(folder, kind, **sizes):
    """A model whose tokenizer has fewer tokens than its embedding has rows, as the published ones."""
    hf_models.save(folder, kind, vocab_size=ROWS, **sizes)
    texts = (text for line in generate("train", 60, seed=1) for text in line.values())
    train_tokenizer(texts, folder / "trained", vocab_size=320)
    for file in (folder / "trained").iterdir():
        file.rename(folder / file.name)
    (folder / "trained").rmdir()


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "qwen3"
    save_with_tokenizer(folder, "qwen3", tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    file = tmp_path_factory.mktemp("problems") / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in generate("train", 60, seed=1)))
    return file


def command(size, *arguments) -> str:
    answers = on_ranks(size, RANKS, "command", arguments=arguments)
    assert all(code == 0 for code, _ in answers), answers
    return answers[0][1]


@pytest.fixture(scope="module")
def imported(hf_dir, tmp_path_factory):
    """A run directory made by TP2xPP2."""
    target = tmp_path_factory.mktemp("runs") / "qwen3"
    command(4, "import", hf_dir, target, "parallel.tensor=2", "parallel.pipeline=2")
    return target


def test_import_train_export(imported, hf_dir, problems, tmp_path):
    run = tmp_path / "run"
    length = ["data.seq_length=128", "data.overlong=drop", f"data.train={problems}", "train.global_batch=4", "train.micro_batch=1"]
    command(2, "train", imported / "config.yaml", "parallel.tensor=2", "train.steps=2", "train.lr=1e-3", "loss.name=dft", f"run_dir={run}", *length)
    said = command(1, "export", run, tmp_path / "out")
    assert f"config.json like {imported / 'tokenizer'}" in said
    before, after = tensors_in(hf_dir), tensors_in(tmp_path / "out")
    tokens = torch.arange(12)[None] + 40
    ((trained, logits),) = on_ranks(1, RANKS, "checkpoint_tensors", run_dir=run, vocab_size=ROWS, tokens=tokens)
    same(after, trained)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert before.keys() == after.keys() and len(changed) == len(before), set(before) - set(changed)
    import transformers

    model, start = (transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tmp_path / "out", hf_dir))
    same({name: tensor for name, tensor in model.state_dict().items() if name in after}, after)
    with torch.no_grad():
        theirs, at_first = model(tokens).logits, start(tokens).logits
    assert (logits[..., :ROWS] - theirs).abs().max() < tol.HF_LOGITS
    assert (theirs - at_first).abs().max() > 1000 * tol.HF_LOGITS
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == len(transformers.AutoTokenizer.from_pretrained(hf_dir))


def test_exporting_the_import_gives_the_same_bits_back_in_any_layout(imported, hf_dir, tmp_path):
    command(2, "export", imported, tmp_path / "out", "parallel.pipeline=2", "parallel.virtual=2")
    same(tensors_in(tmp_path / "out"), tensors_in(hf_dir))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (hf_dir / name).read_bytes() or name == "config.json", name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((hf_dir / "config.json").read_text())


def test_what_an_import_leaves(imported):
    assert (imported / "checkpoints" / "step_00000000" / "train_state.json").is_file()
    values = yaml.safe_load((imported / "config.yaml").read_text())
    assert values["model"]["qk_layernorm"] is True and values["model"]["kv_channels"] == 16 and values["train"]["dtype"] == "fp32"
    assert values["data"]["tokenizer"] == str(imported / "tokenizer") and values["checkpoint"]["init"] == str(imported)
    tokens = json.loads((imported / "checkpoints" / "step_00000000" / "train_state.json").read_text())["vocab_size"]
    multiple = values["model"]["make_vocab_size_divisible_by"]
    assert tokens <= 320 < ROWS <= -(-tokens // multiple) * multiple


def test_the_tokenizer_is_the_one_that_transformers_loads_from_the_whole_directory(tmp_path):
    """For a Qwen2 that is another class, with one token more, than the same files without config.json are."""
    save_with_tokenizer(tmp_path / "hf", "qwen2", dtype=torch.bfloat16)
    command(1, "import", tmp_path / "hf", tmp_path / "run")
    tokens = json.loads((tmp_path / "run" / "checkpoints" / "step_00000000" / "train_state.json").read_text())["vocab_size"]
    ours, theirs = load_tokenizer(tmp_path / "run" / "tokenizer"), load_tokenizer(tmp_path / "hf")
    assert tokens == true_vocab_size(ours) and type(ours) is type(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["dtype"] == "bf16"
    command(1, "export", tmp_path / "run", tmp_path / "out")
    same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "hf"))


def test_a_run_from_random_weights_is_a_llama(problems, tmp_path):
    """config.json is made from the run's own configuration, with its tokenizer's end token."""
    import transformers

    length = ["data.seq_length=128", "data.overlong=drop", f"data.train={problems}", "train.steps=1", "train.global_batch=4", "model.num_layers=2"]
    command(1, "train", f"{ROOT}/configs/sft.yaml", f"run_dir={tmp_path / 'run'}", "train.warmup_steps=0", "train.lr=1e-3", *length)
    said = command(1, "export", tmp_path / "run", tmp_path / "out", "--dtype", "bf16")
    assert "made from config.yaml" in said
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.eos_token_id == tokenizer.eos_token_id
    assert {t.dtype for t in tensors_in(tmp_path / "out").values()} == {torch.bfloat16} == {model.dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    arguments = dict(run_dir=tmp_path / "run", vocab_size=model.config.vocab_size, tokens=torch.arange(8)[None])
    ((trained, _),) = on_ranks(1, RANKS, "checkpoint_tensors", **arguments)
    same(tensors_in(tmp_path / "out"), {name: tensor.bfloat16() for name, tensor in trained.items()})


def cli(*arguments):
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "megatron_plugin.cli", *map(str, arguments)], capture_output=True, text=True,
                          cwd=ROOT, timeout=120)  # fmt: skip
    said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    return done.returncode, said, any(line.endswith("| torch") for line in done.stderr.splitlines())


def test_a_directory_that_is_no_model_is_refused_before_torch(tmp_path):
    code, said, torch_came = cli("import", tmp_path / "nowhere", tmp_path / "run")
    assert (code, torch_came) == (3, False) and "nowhere/config.json: got No such file" in said and len(said.splitlines()) == 1
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    code, said, torch_came = cli("import", tmp_path, tmp_path / "run")
    assert (code, torch_came) == (3, False) and "model_type: got 'mamba', expected one of llama, qwen2, qwen3" in said


@pytest.mark.parametrize("arguments, code, message", [
    (("import", "{hf}", "{hf}"), 3, "which is not empty, expected a run directory to be made"),
    (("import", "{hf}", "{new}", "train.lr=1"), 2, "got the override 'train.lr=1', expected parallel.... or train.dtype=... here"),
    (("import", "{hf}", "{new}", "parallel.tensor=3"), 2, "parallel.tensor"),
    (("import", "{bare}", "{new}"), 4, "cannot load a tokenizer"),
    (("export", "{new}", "{new}2"), 3, "expected a checkpoint or a run directory"),
    (("export", "{run}", "{hf}"), 3, "which is not empty"),
    (("export", "{run}", "{new}", "--like", "{bare}"), 3, "the model is not the one of config.json: num_layers: got 4, expected 3"),
])  # fmt: skip
def test_refusals_are_one_message(arguments, code, message, imported, hf_dir, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((hf_dir / "config.json").read_text()) | {"num_hidden_layers": 3}
    (bare / "config.json").write_text(json.dumps(config))
    places = {"hf": hf_dir, "new": tmp_path / "new", "run": imported, "bare": bare}
    ((got, said),) = on_ranks(1, RANKS, "command", arguments=[a.format(**places) for a in arguments])
    assert got == code and message in said, said
    assert not (tmp_path / "new").exists() and "Traceback" not in said
