"""Configuration: every value traceable, of its type and possible.  Which keys there are: test_config_keys.py."""

import dataclasses
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_plugin.config import ConfigError, GPTArguments, as_config_error, load_config, save_config, to_yaml
from megatron_plugin.config.checks import SMALLEST_BPE, check_files

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
SMALL = """\
train:
  steps: 10
  micro_batch: 2
  global_batch: 8
model:
  num_layers: 4
  hidden_size: 64
  num_attention_heads: 4
"""


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def refused(path, *overrides, world_size=None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    assert caught.value.exit_code == 2
    return caught.value


# ---------------------------------------------------------------- values and where they come from


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "multi_node"], ids=lambda p: p.name)
@pytest.mark.parametrize("world_size, overrides", [
    (1, ()), (2, ()), (4, ("parallel.tensor=2", "parallel.pipeline=2")), (4, ("parallel.tensor=4", "parallel.sequence=true")),
])  # fmt: skip
def test_every_config_is_accepted_alone_and_in_the_layouts_of_the_readme(path, world_size, overrides):
    config = load_config(path, overrides, world_size=world_size)
    assert config.run_dir == f"runs/{path.stem}"
    assert config.num_micro_batches(world_size) >= 1


def test_the_configs_are_the_ones_promised_and_name_losses_that_exist():
    from megatron_plugin.losses.binding import bind

    assert [path.stem for path in FILES] == ["chord", "chord_phi", "debug_cpu", "dft", "grpo", "idft", "multi_node", "sft", "srft"]
    for path in FILES:
        config = load_config(path)
        bind(config.loss_name, **config.loss_params)
        assert config.loss_name == ("dft" if path.stem in ("debug_cpu", "multi_node") else path.stem)


def test_the_multi_node_example_is_for_the_ranks_it_names():
    path = CONFIGS / "multi_node.yaml"
    config = load_config(path, world_size=32)
    assert (config.data_parallel(32), config.num_micro_batches(32)) == (4, 32) and "4 nodes of 8 GPUs as tensor 4 x pipeline 2 x data parallel 4" in path.read_text()
    assert load_config(path, world_size=128).num_micro_batches(128) == 8, "more nodes are more data parallel"
    assert "expected a multiple of 8" in str(refused(path, world_size=12))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_line_of_a_config_is_explained(path):
    """By a comment behind the key, or behind the key of its section."""
    section = ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not re.match(r" *\w+:", line):
            continue
        key, _, comment = line.partition("#")
        if not line.startswith(" "):
            section = comment
            if not key.partition(":")[2].strip():
                continue
        assert comment.strip() or section.strip(), f"{path.name}:{number}: {line}"


def test_the_configs_are_few():
    assert len(FILES) <= 10


def test_weighted_configs_say_where_a_warm_start_comes_from():
    for name in ("dft", "chord_phi", "idft"):
        assert f"configs/{name}.yaml checkpoint.init=runs/sft" in (CONFIGS / f"{name}.yaml").read_text()
        # the weights of sft.yaml must fit into the model that takes them over
        assert load_config(CONFIGS / f"{name}.yaml").model == load_config(CONFIGS / "sft.yaml").model


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(small):
    config = load_config(small, ["train.steps=20", "train.steps=30", "train.lr=2e-5", "loss.name=idft", "loss.beta=0.5"])
    assert (config.train.steps, config.train.micro_batch, config.train.eval_interval) == (30, 2, 50)
    assert config.train.lr == 2e-5 and isinstance(config.train.lr, float)  # PyYAML alone reads 2e-5 as text
    assert (config.loss_name, config.loss_params) == ("idft", {"beta": 0.5})
    assert config.sources["train.steps"] == "command line"
    assert config.sources["train.micro_batch"] == f"{small}:3"
    assert "train.eval_interval" not in config.sources


def test_model_keys_are_split_between_transformer_config_and_gpt_model(small):
    config = load_config(small, ["model.position_embedding_type=rope", "model.rotary_base=500000"])
    assert config.gpt == GPTArguments(position_embedding_type="rope", rotary_base=500000)
    assert config.transformer == {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize("text, expected", [("a.jsonl", ["a.jsonl"]), ("[a.jsonl,b.jsonl]", ["a.jsonl", "b.jsonl"]), ("", []), ("[]", [])])
def test_data_is_one_path_or_a_list_or_empty(small, text, expected):
    assert load_config(small, [f"data.train={text}"]).data.train == expected


def test_empty_values_and_references(small):
    config = load_config(small, ["data.tokenizer=x", "data.tokenizer=", "run_dir=", "train.min_lr=${train.lr}", "mu.peak=0.5"])
    assert (config.data.tokenizer, config.run_dir, config.train.min_lr) == ("", "runs/small", config.train.lr)
    assert (config.mu.peak, load_config(small).mu) == (0.5, None)


def test_saved_configuration_reads_back_the_same_and_says_where_values_came_from(small, tmp_path):
    config = load_config(small, ["data.train=[a.jsonl,'b: c.jsonl']", "loss.name=my.loss", "loss.gamma=1e-7", "train.lr=1e-5",
    "run_dir=runs/ä # b",
                                 "mu.valley=0.05", "model.window_size=[128,0]", "model.ffn_hidden_size=null"])  # fmt: skip
    saved = tmp_path / "run" / "config.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
    assert [path.name for path in saved.parent.iterdir()] == ["config.yaml"]
    text = to_yaml(config)
    assert re.search(r"^  lr: 1.0e-05 +# command line$", text, re.M)
    assert re.search(rf"^  steps: 10 +# {re.escape(str(small))}:2$", text, re.M)
    assert re.search(r"^  eval_interval: 50$", text, re.M)


def test_saved_yaml_is_plain(small):
    """Readable by any YAML reader: no tags, no interpolation left."""
    loaded = OmegaConf.to_container(OmegaConf.create(to_yaml(load_config(small, ["train.min_lr=${train.lr}"]))), resolve=False)
    assert loaded["train"]["min_lr"] == loaded["train"]["lr"] == 1e-5


def test_nothing_changes_a_configuration(small):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(small).train.steps = 3


# ---------------------------------------------------------------- values

WRONG_TYPE = {
    "train.steps=abc": "got 'abc', expected a whole number", "train.steps=4.5": "got 4.5, expected a whole number",
    "train.lr=true": "got True, expected a number", "train.dtype=fp16": "got 'fp16', expected one of fp32, bf16",
    "data.packing=3.5": "got 3.5, expected true or false", "data.train={a: 1}": "got {'a': 1}, expected a path or a list of paths",
    "data.train=[[a]]": "expected a path or a list of paths", "run_dir=[a]": "got ['a'], expected text",
    "train=3": "expected keys below it",
    "loss=dft": "expected keys below it (loss.name", "loss.beta=[1]": "expected a finite number",
    "loss.beta=.inf": "expected a finite number",
    "loss.name=3": "expected the name of a loss", "model.num_layers=true": "got True, expected int",
    "model.num_layers=4.0": "got 4.0, expected int",
    "model.normalization=Norm": "got 'Norm', expected Literal['LayerNorm', 'RMSNorm']",
    "model.window_size=3": "expected Optional[Tuple[int, int]]",
    "model.activation_func=tanh": "expected one of gelu, silu, relu", "model.add_bias_linear=1": "got 1, expected bool",
    "model.position_embedding_type=rop": "expected Literal['learned_absolute', 'rope', 'none']",
    "train.steps=${train.stps}": "'train.stps' not found",
}  # fmt: skip


@pytest.mark.parametrize("override, message", WRONG_TYPE.items())
def test_wrong_type(small, override, message):
    error = refused(small, override)
    assert message in str(error) and error.key == override.partition("=")[0] and error.where == "command line"


RIGHT_TYPE = [
    "model.num_query_groups=null", "model.layernorm_epsilon=1", "model.rotary_base=10000", "model.recompute_modules=[mlp]",
    "loss.z_loss=true", "model.activation_func=silu", "model.seq_len_interpolation_factor=2", "model.fp8=e4m3",
]  # fmt: skip


@pytest.mark.parametrize("override", RIGHT_TYPE)
def test_right_types_of_free_keys(small, override):
    load_config(small, [override])


IMPOSSIBLE = {  # override -> (key, part of the message)
    "train.steps=0": ("train.steps", "at least 1"), "train.lr=-1": ("train.lr", "at least 0"), "train.lr=0": ("train.lr", "positive"),
    "train.lr=.nan": ("train.lr", "finite"), "train.min_lr=1": ("train.min_lr", "at most train.lr"),
    "train.warmup_steps=10": ("train.warmup_steps", "fewer than train.steps (10)"), "train.adam_beta2=1": ("train.adam_beta2",
    "less than 1"),
    "train.micro_batch=3": ("train.global_batch", "multiple of 3 (train.micro_batch 3); try 9"),
    "parallel.tensor=-2": ("parallel.tensor", "at least 1"),
    "parallel.tensor=3": ("model.num_attention_heads", "multiple of 3 (parallel.tensor 3); try 6"),
    "parallel.pipeline=3": ("model.num_layers", "multiple of 3"), "parallel.virtual=2": ("parallel.virtual",
    "set parallel.pipeline above 1"),
    "parallel.sequence=true": ("parallel.sequence", "parallel.tensor is 1"), "model.hidden_size=66": ("model.hidden_size", "multiple of 4"),
    "model.num_query_groups=3": ("model.num_query_groups", "divisor of model.num_attention_heads (4)"), "seed=-1": ("seed", "at least 0"),
    "data.seq_length=1": ("data.seq_length", "at least 2"), "data.max_bad_fraction=1.5": ("data.max_bad_fraction", "[0, 1]"),
    "data.bpe_vocab_size=262": ("data.bpe_vocab_size", "at least 263"), "mu={peak: 0.1, valley: 0.2}": ("mu.valley", "at most mu.peak"),
    "mu.peak=2": ("mu.peak", "[0, 1]"), "checkpoint.resume=": ("checkpoint.resume", "auto, never"),
    "model.num_layers=0": ("model.num_layers", "at least 1"),
    "model.hidden_dropout=2": ("model.hidden_dropout", "[0, 1]"),
}  # fmt: skip


@pytest.mark.parametrize("override, expected", IMPOSSIBLE.items())
def test_impossible_values(small, override, expected):
    error = refused(small, override)
    assert error.key == expected[0] and expected[1] in error.reason and error.reason.startswith("got ")
    assert error.where in ("command line", "default") or error.where.startswith(str(small))


LAYOUTS = [  # ranks, overrides -> key, part of the message
    (1, ["parallel.tensor=2"], "world size", "got 1 rank, expected a multiple of 2"),
    (6, ["parallel.tensor=2", "parallel.pipeline=2"], "world size", "multiple of 4 (parallel.tensor 2 x parallel.pipeline 2"),
    (3, [], "train.global_batch", "multiple of 6 (train.micro_batch 2 x 3 data-parallel ranks); try 12"),
    (2, ["parallel.pipeline=2", "parallel.virtual=3", "model.num_layers=4"], "model.num_layers", "multiple of 6"),
    (2, ["parallel.pipeline=2", "parallel.virtual=2", "train.global_batch=6"], "train.global_batch", "taken 2 at a time); try 8"),
    (2, ["parallel.tensor=2", "parallel.sequence=true", "data.seq_length=33"], "data.seq_length", "multiple of 2"),
    (2, ["parallel.context=2", "data.seq_length=66"], "data.seq_length", "multiple of 4 (2 x parallel.context 2); try 68"),
    (2, ["parallel.tensor=2", "model.ffn_hidden_size=33"], "model.ffn_hidden_size", "multiple of 2"),
    (4, ["parallel.tensor=4", "model.num_attention_heads=12", "model.hidden_size=96",
    "model.num_query_groups=6"], "model.num_query_groups", "divisor"),
]  # fmt: skip


@pytest.mark.parametrize("world_size, overrides, key, message", LAYOUTS)
def test_impossible_layouts(small, world_size, overrides, key, message):
    error = refused(small, *overrides, world_size=world_size)
    assert error.key == key and message in error.reason


def test_possible_layouts(small):
    load_config(small, ["parallel.tensor=2"])  # nothing is known about the ranks
    load_config(small, ["parallel.pipeline=2", "parallel.virtual=2"], world_size=4)
    load_config(small, ["parallel.tensor=4", "model.num_query_groups=2"], world_size=4)
    load_config(small, ["parallel.pipeline=2", "model.num_layers=5", "model.num_layers_in_first_pipeline_stage=2"], world_size=2)
    assert load_config(small, ["parallel.tensor=2"], world_size=8).num_micro_batches(8) == 1


def test_smallest_vocabulary_is_the_tokenizers_own(tmp_path):
    from megatron_plugin.data import train_tokenizer

    with pytest.raises(ValueError, match=f"at least {SMALLEST_BPE} "):
        train_tokenizer([], tmp_path / "t", vocab_size=SMALLEST_BPE - 1)


# ---------------------------------------------------------------- files

BAD_FILES = {
    "train: {steps: 3\n": ":2: got text that is no YAML", "- a\n": "got a YAML list",
    "seed: 1\nseed: 2\n": ":2: got text that is no YAML (found duplicate key",
    "train.steps: 1\n": ":1: train.steps: got a key with a dot, expected 'steps:' indented below 'train:'",
    "a: b: c\n": "got text that is no YAML",
    "": "model.num_layers: got nothing", "train: 3\n": ":1: train: got 3, expected keys below it",
    "model:\n  num_layers: 4\n": "model.hidden_size: got nothing",
    "1: 2\n": ":1: 1: got an unknown key",
}  # fmt: skip


@pytest.mark.parametrize("text, message", BAD_FILES.items())
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    error = str(refused(path))
    assert error.startswith(str(path)) and message in error


def test_files_that_cannot_be_read(tmp_path):
    assert "No such file" in str(refused(tmp_path / "none.yaml"))
    assert "Is a directory" in str(refused(tmp_path))
    (tmp_path / "latin").write_bytes(b"run_dir: \xe4\n")
    assert "no YAML" in str(refused(tmp_path / "latin"))


@pytest.mark.parametrize("override", ["steps", "=3", "+a.b=1", "~train", "--train.steps=3", "train.steps=[3"])
def test_overrides_that_are_none(small, override):
    error = refused(small, override)
    assert repr(override) in str(error) and "key=value" in str(error)


def test_missing_data_is_a_data_error(small, tmp_path):
    (tmp_path / "there.jsonl").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    check_files(load_config(small, [f"data.train={tmp_path}/there.jsonl", f"data.tokenizer={tmp_path}/t", f"run_dir={tmp_path}/run"]))
    for override in ("data.train=[nowhere.jsonl]", "data.eval=nowhere.jsonl", f"data.train={tmp_path}/empty.jsonl", "data.train=~/x.jsonl",
    "data.tokenizer=nowhere", f"data.tokenizer={tmp_path}/there.jsonl", f"data.tokenizer={tmp_path}",
                     "data.chat_template=nowhere", f"data.train={tmp_path}"):  # fmt: skip
        with pytest.raises(ConfigError, match=f"command line: {override.partition('=')[0]}: got ") as caught:
            check_files(load_config(small, [override]))
        assert caught.value.exit_code == 4


def test_a_missing_checkpoint_is_found_before_torch_is_imported(small, tmp_path):
    """As configs/chord.yaml's runs/sft is before that run was made.  A run that goes on from a checkpoint of its own does not look at checkpoint.init."""
    run = tmp_path / "run"
    for key in ("checkpoint.init", "checkpoint.resume"):
        with pytest.raises(ConfigError, match=f"command line: {key}: got 'runs/nowhere', expected a run directory or checkpoint that exists") as caught:
            check_files(load_config(small, [f"{key}=runs/nowhere", f"run_dir={run}"]))
        assert caught.value.exit_code == 3
    with pytest.raises(ConfigError, match="checkpoint.init"):
        check_files(load_config(small, [f"checkpoint.init={tmp_path}", f"run_dir={run}"]))
    (tmp_path / "other" / "checkpoints" / "step_00000010").mkdir(parents=True)
    for there in ("other", "other/checkpoints/step_00000010"):
        check_files(load_config(small, [f"checkpoint.init={tmp_path}/{there}", f"run_dir={run}"]))
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    check_files(load_config(small, ["checkpoint.init=runs/nowhere", f"run_dir={run}"]))


def test_library_errors_become_configuration_errors():
    with pytest.raises(ConfigError, match="x.yaml:3: loss: bad beta") as caught, as_config_error("loss", "x.yaml:3"):
        raise ValueError("bad beta")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ConfigError, match="^mine$"), as_config_error("loss"):
        raise ConfigError("mine")
    with pytest.raises(RuntimeError), as_config_error("loss"):
        raise RuntimeError("not about an argument")


# ---------------------------------------------------------------- everything at once, and nothing that runs


def said(path, *overrides, world_size=None) -> list[str]:
    return str(refused(path, *overrides, world_size=world_size)).splitlines()


def test_every_mistake_is_told_at_once_in_two_stages(small):
    """What each value says by itself; how they fit each other only when that is right, for it may follow from the mistake."""
    first, *others = said(small, "train.stpes=3", "train.lr=fast", "train.micro_batch=0", "seed=-1", "parallel.tensor=3", "model.num_layer=2")
    assert first == "command line: train.stpes: got an unknown key; did you mean 'train.steps'?"
    assert [line.partition(": got")[0] for line in others] == [
        "  also command line: model.num_layer", "  also command line: train.lr", "  also command line: train.micro_batch", "  also command line: seed"
    ]  # fmt: skip
    keys = [line.partition(": got")[0].rpartition(": ")[2] for line in said(small, "parallel.tensor=3", "train.min_lr=1", "train.global_batch=7", world_size=4)]
    assert keys == ["train.min_lr", "train.global_batch", "model.num_attention_heads", "model.ffn_hidden_size", "world size"], "each key once"


def test_a_mistake_is_not_told_again_as_what_follows_from_it(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(SMALL.replace("num_layers", "num_layer"))
    assert [line.rpartition("; ")[2] for line in said(path)] == ["did you mean 'model.num_layers'?"]


def test_every_missing_file_is_told(small):
    with pytest.raises(ConfigError) as caught:
        check_files(load_config(small, ["data.train=[a.jsonl,b.jsonl]", "data.tokenizer=t"]))
    assert [line.partition(", expected")[0].rpartition("got ")[2] for line in str(caught.value).splitlines()] == ["'a.jsonl', which is nothing", "'b.jsonl', which is nothing", "'t'"]
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "a${oc.env:HOME}b", "${oc.decode:'1'}", "[x, '${oc.env:HOME}']", "${oc.${run_dir}:HOME}", "${..lr}${oc.env:A}"])
def test_functions_of_omegaconf_are_not_run(small, value):
    assert "expected a plain value or another key" in str(refused(small, f"data.train={value}"))
    assert load_config(small, ["run_dir=${loss.name}/${train.lr}"]).run_dir == "sft/1e-05"


def test_secrets_are_masked_and_other_words_are_not(small):
    text = to_yaml(load_config(small, [
        "loss.name=my.loss", "loss.api_key=hunter2", "loss.token=hunter2", "loss.Password=hunter2", "loss.url=https://me:hunter2@h/v1?x=a@b",
        "loss.tokens=many", "loss.key=3", "loss.keyword=shown", "data.train=[s3://k:hunter2@b/x.jsonl]",
    ]))  # fmt: skip
    assert "hunter2" not in text and text.count("***") == 5
    for shown in ("url: https://***@h/v1?x=a@b", "tokens: many", "key: 3", "keyword: shown", "s3://***@b/x.jsonl"):
        assert shown in text, shown


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: &a {b: *a}\n", "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))])
def test_aliases_without_end(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert "more than 10000 values" in str(refused(path))


def test_aliases_may_be_used(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("train: &t {steps: 10}\nmodel: &m {num_layers: 4, hidden_size: &h 64, num_attention_heads: 4, ffn_hidden_size: *h}\n")
    assert load_config(path).model["ffn_hidden_size"] == 64
