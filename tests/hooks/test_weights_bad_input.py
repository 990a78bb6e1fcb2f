"""Directories and models that do not fit: one error, on every rank, before a weight is touched."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hooks import hf_models
from tests.hooks.hf_models import tensors_in
from tests.spawn import on_ranks

RANKS = "tests.hooks.weights_ranks"


@pytest.fixture
def hf_dir(tmp_path):
    hf_models.save(tmp_path / "hf", "qwen2", shard="1GB")
    return tmp_path / "hf"


def refused(message, size=2, **arguments):
    answers = on_ranks(size, RANKS, "refusal", tensor=size, **arguments)
    for text, untouched in answers:
        assert text and message in text and untouched, text


@pytest.mark.parametrize("change, message", [
    ({"num_query_groups": 8}, "num_query_groups: got 8, expected 4"),
    ({"ffn_hidden_size": 96}, "ffn_hidden_size: got 96, expected 80"),
    ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon: got 1e-06, expected 1e-05"),
    ({"add_qkv_bias": False}, "add_qkv_bias: got False, expected True"),
    ({"activation_func": torch.nn.functional.gelu}, "activation_func: got gelu, expected silu"),
    ({"rotary_base": 10_000}, "rotary_base or rope_scaling: got lowest frequencies"),
    ({"rope_scaling": True, "rope_scaling_factor": 32.0}, "rotary_base or rope_scaling: got lowest frequencies"),
    ({"rotary_interleaved": True}, "rotary_interleaved: got True, expected False"),
    ({"share_embeddings_and_output_weights": True}, "share_embeddings_and_output_weights: got True, expected False"),
    ({"num_layers": 5, "qk_layernorm": True}, "num_layers: got 5, expected 4; qk_layernorm: got True, expected False"),
])  # fmt: skip
def test_a_model_of_another_shape_is_told_every_field(change, message, hf_dir):
    refused(message, size=1, source=hf_dir, change=change)


def test_a_vocabulary_that_has_no_room(hf_dir, tmp_path):
    refused("vocab_size: got 96, expected at least 99", source=hf_dir, padded=96)
    refused("vocab_size: got 96, expected at least 99", source=hf_dir, padded=96, target=tmp_path / "out")
    assert not (tmp_path / "out").exists()


Q = "model.layers.2.self_attn.q_proj.weight"


def without_q(tensors):
    del tensors[Q]


def with_more(tensors):
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.ones(2)


def wider(tensors):
    tensors[Q] = torch.ones(48, 50)


def quantised(tensors):
    tensors[Q] = torch.ones(48, 48, dtype=torch.int8)


@pytest.mark.parametrize("fault, message", [
    (without_q, f"got no tensor {Q}, expected it from config.json"),
    (with_more, "model.safetensors: got the tensor model.layers.9.mlp.up_proj.weight, expected none of that name"),
    (wider, f"model.safetensors: {Q}: got a shape of (48, 50), expected (48, 48)"),
    (quantised, f"model.safetensors: {Q}: got dtype I8, expected one of F64, F32, F16, BF16"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named_with_their_file(fault, message, hf_dir):
    file = hf_dir / "model.safetensors"
    tensors = load_file(file)
    fault(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    refused(message, source=hf_dir)


def test_broken_directories(hf_dir, tmp_path):
    file = hf_dir / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused("model.safetensors: got a file that cannot be read", source=hf_dir)
    index = hf_dir / "model.safetensors.index.json"
    index.write_text("{}")
    refused("model.safetensors.index.json: got no weight_map", source=hf_dir)
    file.write_bytes(whole)
    names = list(load_file(file))
    save_file({"other": torch.ones(1)}, hf_dir / "model-2.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors") | {Q: "model-2.safetensors"}}))
    refused(f"model-2.safetensors: got no tensor {Q}, expected it there", source=hf_dir)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-3.safetensors")}))
    refused("model-3.safetensors: got a file that cannot be read", source=hf_dir)
    index.unlink()
    file.unlink()
    (hf_dir / "model-2.safetensors").unlink()
    refused("got no safetensors files, expected model.safetensors", source=hf_dir)


def test_what_transformers_ignores_is_ignored(tmp_path):
    """Old Llama files have rotary frequencies, tied ones sometimes a second copy of the embedding."""
    hf_models.save(tmp_path / "hf", "llama", tie_word_embeddings=True, shard="1GB")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = tensors_in(tmp_path / "hf")
    extra = {"lm_head.weight": torch.zeros(99, 48), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file(tensors | extra, file, metadata={"format": "pt"})
    answers = on_ranks(2, RANKS, "round_trip", source=tmp_path / "hf", target=tmp_path / "back", tensor=2)
    assert answers[0][2].keys() == tensors.keys() == tensors_in(tmp_path / "back").keys()


def test_an_export_never_overwrites(hf_dir, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("mine")
    refused("which is not empty", source=hf_dir, target=tmp_path / "there")
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["x"]


def test_a_chunk_that_is_left_out_is_missed(hf_dir):
    for text in on_ranks(2, RANKS, "incomplete", source=hf_dir):
        assert "expected every rank to take part with all its chunks" in text


def test_an_error_of_one_rank_is_every_ranks():
    assert on_ranks(3, RANKS, "fails_on_rank_1") == ["only here"] * 3


def test_one_parameter_at_a_time(hf_dir):
    for most, count in on_ranks(2, RANKS, "most_alive", source=hf_dir):
        assert most <= 2 and count == 4 * 12 + 3  # q is gone, k and v wait


def test_megatron_bridge_is_asked_when_it_imports_and_knows_the_names(hf_dir, tmp_path):
    """With a stand-in module: which calls are made, not what they do."""
    ((te, own, local, refusal),) = on_ranks(1, RANKS, "with_bridge", source=hf_dir, target=tmp_path / "out")
    first = ("from_hf_pretrained", str(hf_dir))
    assert te == [
        [first, ("load_hf_weights", ["GPTModel"])],
        [first, ("export_hf_weights", ["GPTModel"])],
        [first, ("save_hf_pretrained", str(tmp_path / "out0"))],
    ]
    assert own == local == [[], [], []] and "local spec, whose norms it would leave out" in refusal
    assert not (tmp_path / "out0").exists() and (tmp_path / "out1" / "model.safetensors").is_file()


def test_megatron_bridge_asked_for_and_not_there():
    from megatron_plugin.hooks.weights import WeightsError
    from megatron_plugin.hooks.weights.bridge import bridge_for

    assert bridge_for("somewhere", "auto", local_names=False) is None
    with pytest.raises(WeightsError, match="megatron.bridge does not import"):
        bridge_for("somewhere", "bridge", local_names=False)
    with pytest.raises(WeightsError, match="got backend 'best', expected auto, own or bridge"):
        bridge_for("somewhere", "best", local_names=False)
