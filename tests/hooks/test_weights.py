"""Hugging Face -> megatron-core -> Hugging Face under real layouts: the same bits back, and transformers' logits in between."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import tolerances as tol
from tests.hooks import hf_models
from tests.hooks.hf_models import same, tensors_in
from tests.spawn import on_ranks

RANKS = "tests.hooks.weights_ranks"
TOKENS = torch.randint(0, hf_models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))


def largest_error(answers: list, model, tokens=TOKENS) -> float:
    with torch.no_grad():
        truth = model(tokens).logits
    logits = [answer[1] for answer in answers if answer[1] is not None]
    assert logits and truth.abs().max() > 1
    assert not any(x[..., hf_models.VOCABULARY :].abs().max() for x in logits), "padded columns of zero rows"
    return max(float((x[..., : hf_models.VOCABULARY] - truth).abs().max()) for x in logits)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_tp2_pp2_has_transformers_logits_and_gives_the_same_bits_back(kind, tied, tmp_path):
    source, target = tmp_path / "hf", tmp_path / "back"
    model = hf_models.save(source, kind, tie_word_embeddings=tied)
    answers = on_ranks(4, RANKS, "round_trip", source=source, target=target, tokens=TOKENS, tensor=2, pipeline=2, file_bytes=60_000)
    truth = tensors_in(source)
    assert ("lm_head.weight" in truth) is not tied
    same(tensors_in(target), truth)
    for _, _, everywhere, _ in answers:
        same(everywhere, truth)
    assert [len(a[3]) for a in answers] == [0, 0, 0, len(truth)]
    assert largest_error(answers, model) < tol.HF_LOGITS
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    assert after == before
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == truth.keys() and index["metadata"]["total_size"] == sum(t.nbytes for t in truth.values())
    files = sorted(target.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert all(file.stat().st_size < 70_000 or len(load_file(file)) == 1 for file in files)
    assert {file.stat().st_mode for file in files} == {(target / "config.json").stat().st_mode}, "whoever may read one may read all"


# four ranks share two groups: linear_qkv is cut inside a group
LAYOUTS = {
    "one rank": (1, {}),
    "TP4, 2 groups": (4, dict(tensor=4)),
    "PP2xVPP2": (2, dict(pipeline=2, virtual=2)),
    "TP2xDP2": (4, dict(tensor=2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_same_model(name, tmp_path):
    size, sizes = LAYOUTS[name]
    groups = {"num_key_value_heads": 2} if "groups" in name else {}
    model = hf_models.save(tmp_path / "hf", "qwen2", tie_word_embeddings="VPP" in name, shard="1GB", **groups)
    answers = on_ranks(size, RANKS, "round_trip", source=tmp_path / "hf", target=tmp_path / "back", tokens=TOKENS, **sizes)
    same(tensors_in(tmp_path / "back"), tensors_in(tmp_path / "hf"))
    assert largest_error(answers, model) < tol.HF_LOGITS
    assert [file.name for file in (tmp_path / "back").glob("*.safetensors*")] == ["model.safetensors"]


def test_transformer_engines_names_are_the_same_model(tmp_path):
    """Norms inside linear_qkv and linear_fc1.  The layers are a stand-in in torch: Transformer Engine itself has not run."""
    model = hf_models.save(tmp_path / "hf", "qwen3")
    arguments = dict(source=tmp_path / "hf", target=tmp_path / "back", tokens=TOKENS, tensor=2, pipeline=2, te_names=True)
    answers = on_ranks(4, RANKS, "round_trip", **arguments)
    same(tensors_in(tmp_path / "back"), tensors_in(tmp_path / "hf"))
    assert largest_error(answers, model) < tol.HF_LOGITS


def test_llama3_rotary_scaling_is_transformers_own(tmp_path):
    model = hf_models.save(tmp_path / "hf", "llama3")
    (ours,) = on_ranks(1, RANKS, "frequencies", source=tmp_path / "hf")
    theirs = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    plain = 1 / 500_000.0 ** (torch.arange(0, 16, 2) / 16)
    ratio = theirs / plain
    assert (ratio > 0.99).any() and (ratio < 0.126).any() and ((ratio > 0.2) & (ratio < 0.9)).any(), "all three bands are there"
    tokens = torch.randint(0, hf_models.VOCABULARY, (1, 512), generator=torch.Generator().manual_seed(6))
    answers = on_ranks(2, RANKS, "round_trip", source=tmp_path / "hf", target=tmp_path / "back", tokens=tokens, tensor=2)
    assert largest_error(answers, model, tokens) < tol.HF_LOGITS
    same(tensors_in(tmp_path / "back"), tensors_in(tmp_path / "hf"))
    # and the scaling is seen at all in these logits
    config = model.config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
    unscaled = type(model)(type(model.config)(**config)).eval()
    unscaled.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert (unscaled(tokens).logits - model(tokens).logits).abs().max() > 100 * tol.HF_LOGITS


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bf16_comes_back_bit_by_bit_also_through_fp32(dtype, tmp_path):
    hf_models.save(tmp_path / "hf", "qwen3", dtype=torch.bfloat16)
    arguments = dict(source=tmp_path / "hf", target=tmp_path / "back", dtype=dtype, export_dtype="bfloat16", tensor=2)
    answers = on_ranks(2, RANKS, "round_trip", **arguments)
    assert {t.dtype for t in answers[0][2].values()} == {getattr(torch, dtype)}
    same(tensors_in(tmp_path / "back"), tensors_in(tmp_path / "hf"))
    assert "bfloat16" in (tmp_path / "back" / "config.json").read_text()


def test_a_rank_reads_its_slices_and_no_more(tmp_path):
    """Norms are read by every tensor-parallel rank that has them; everything else exactly once."""
    hf_models.save(tmp_path / "hf", "qwen2")
    answers = on_ranks(4, RANKS, "round_trip", source=tmp_path / "hf", target=tmp_path / "back", tensor=2, pipeline=2)
    tensors = tensors_in(tmp_path / "hf")
    norms = sum(t.nbytes for name, t in tensors.items() if "norm" in name)
    assert sum(a[0] for a in answers) == sum(t.nbytes for t in tensors.values()) + norms
    assert max(a[0] for a in answers) < 0.35 * sum(t.nbytes for t in tensors.values())
