"""The map itself: configuration, names and slices, against transformers' own configurations and against the interleaving written out."""

import pytest
import torch

from megatron_plugin.hooks.weights import WeightsError, hf_config_of, transformer_fields
from megatron_plugin.hooks.weights.model import whole_model_name
from megatron_plugin.hooks.weights.names import Dims, expected_tensors, rule_of
from megatron_plugin.hooks.weights.slices import axis, pieces, shard_shape, shards_of
from tests.hooks import hf_models
from tests.hooks.hf_models import tensors_in

DIMS = Dims(layers=2, hidden=6, heads=8, groups=4, head_dim=2, ffn=16, vocab=11, tied=False, qkv_bias=True, qk_norm=True)
LAYER = "decoder.layers.1."


def dims_of(fields) -> Dims:
    return Dims.of(fields.transformer, tied=fields.gpt["share_embeddings_and_output_weights"], vocab=fields.vocab_size)


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize("kind", hf_models.KINDS)
def test_fields_of_transformers_5_and_4_and_back(kind):
    import transformers

    _, cls, fields = hf_models.KINDS[kind]
    new = getattr(transformers, cls)(**hf_models.SIZES | fields).to_dict()
    rope = new.pop("rope_parameters")
    old = new | {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else rope}
    ours = transformer_fields(new | {"rope_parameters": rope})
    assert ours == transformer_fields(old)
    assert ours.transformer["kv_channels"] == (16 if "3" in kind else 6) and ours.transformer["num_query_groups"] == 4
    assert ours.transformer["add_qkv_bias"] is (kind == "qwen2") and ours.transformer["qk_layernorm"] is (kind == "qwen3")
    assert ours.gpt["rotary_base"] == rope["rope_theta"] and ours.gpt["rope_scaling"] is (kind == "llama3")
    assert ours.transformer_arguments()["activation_func"] is torch.nn.functional.silu
    made = hf_config_of(ours.transformer | ours.gpt, vocab_size=ours.vocab_size, max_positions=ours.max_positions)
    assert transformer_fields(made) == ours
    assert getattr(transformers, cls)(**made).rope_parameters["rope_type"] == rope["rope_type"]


GOOD = dict(model_type="llama", vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=8)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gemma2"}, "model_type: got 'gemma2', expected one of llama, qwen2, qwen3, qwen3_moe"),
    ({"hidden_size": None}, "hidden_size: got None, expected a positive whole number"),
    ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected 'silu'"),
    ({"attention_bias": True}, "attention_bias: got True, expected False"),
    ({"use_sliding_window": True}, "use_sliding_window: got True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: got {'bits': 4}, expected None"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: got 'yarn', expected default or llama3"),
    ({"rope_parameters": hf_models.LLAMA3 | {"original_max_position_embeddings": 4096}}, "original_max_position_embeddings: got 4096, expected 8192"),
])  # fmt: skip
def test_what_megatron_core_computes_differently_is_refused(change, message):
    assert transformer_fields(GOOD).gpt["rotary_base"] == 10000
    with pytest.raises(WeightsError) as error:
        transformer_fields(GOOD | change)
    assert f"config.json: {message}" in str(error.value)


@pytest.mark.parametrize("change, message", [
    ({"normalization": "LayerNorm"}, "model.normalization: got 'LayerNorm', expected 'RMSNorm'"),
    ({"add_bias_linear": True}, "model.add_bias_linear: got True"),
    ({"position_embedding_type": "learned_absolute"}, "model.position_embedding_type"),
    ({"add_qkv_bias": True, "qk_layernorm": True}, "model.qk_layernorm: got True, expected False beside add_qkv_bias=True"),
    ({"add_qkv_bias": True, "kv_channels": 16}, "model.kv_channels: got 16, expected hidden_size / num_attention_heads = 6"),
])  # fmt: skip
def test_what_no_such_model_has_cannot_be_exported(change, message):
    fields = transformer_fields(GOOD)
    section = fields.transformer | fields.gpt
    with pytest.raises(WeightsError, match=message.replace("(", r"\(")):
        hf_config_of(section | change, vocab_size=99, max_positions=64)
    left_out = {k: v for k, v in section.items() if k not in change}
    if len(left_out) < len(section) and "add_qkv_bias" not in change:  # megatron-core's default is as bad
        with pytest.raises(WeightsError, match="expected"):
            hf_config_of(left_out, vocab_size=99, max_positions=64)


# ---------------------------------------------------------------- names


def test_transformer_engine_names_are_the_local_ones():
    for ours, te in (("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
                     ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")):  # fmt: skip
        assert rule_of(LAYER + ours, DIMS) == rule_of(LAYER + te, DIMS)
    assert rule_of(LAYER + "pre_mlp_layernorm.weight", DIMS).parts[0].name == "model.layers.1.post_attention_layernorm.weight"
    assert rule_of(LAYER + "self_attention.k_layernorm.weight", DIMS).parts[0].name == "model.layers.1.self_attn.k_norm.weight"


@pytest.mark.parametrize("name", ["mtp.layers.0.enorm.weight", LAYER + "mlp.linear_fc1.bias", LAYER + "mlp.router.weight", "output_layer.bias",
                                  LAYER + "self_attention.linear_qkv.adapter.linear_in.weight"])  # fmt: skip
def test_a_parameter_without_a_tensor_is_named(name):
    with pytest.raises(WeightsError, match=f"got the parameter {name}"):
        rule_of(name, DIMS)


def test_layers_and_experts_are_counted_over_the_whole_model():
    assert whole_model_name("decoder.layers.1.mlp.linear_fc2.weight", [4, 6]) == "decoder.layers.6.mlp.linear_fc2.weight"
    one = whole_model_name("decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight", [2], first_expert=8)
    grouped = whole_model_name("decoder.layers.0.mlp.experts.linear_fc1.weight3", [2], first_expert=8)
    assert one == "decoder.layers.2.mlp.experts.local_experts.11.linear_fc1.weight"
    assert grouped == "decoder.layers.2.mlp.experts.linear_fc1.weight11"
    moe = Dims(layers=3, hidden=6, heads=2, groups=2, head_dim=3, ffn=8, vocab=11, tied=False, experts=16, expert_ffn=4)
    assert rule_of(one, moe) == rule_of(grouped, moe)
    gate, up = rule_of(one, moe).parts
    assert (gate.name, gate.shape) == ("model.layers.2.mlp.experts.11.gate_proj.weight", (4, 6)) and up.name.endswith("11.up_proj.weight")
    assert rule_of("decoder.layers.2.mlp.router.weight", moe).parts[0].name == "model.layers.2.mlp.gate.weight"


def test_qwen3_moe_names_are_those_that_transformers_writes(tmp_path):
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    fields = transformer_fields(config.to_dict())
    assert fields.transformer["num_moe_experts"] == 4 and fields.transformer["moe_router_pre_softmax"] is False
    assert expected_tensors(dims_of(fields)) == {name: tuple(tensor.shape) for name, tensor in tensors_in(tmp_path).items()}


# ---------------------------------------------------------------- slices


def whole_tensors(rule):
    """Every element different."""
    tensors, start = [], 1
    for part in rule.parts:
        n = torch.Size(part.shape).numel()
        tensors.append(torch.arange(start, start + n).view(part.shape))
        start += n
    return tensors


def shard_of(rule, shard, shards, padded=None):
    out = torch.zeros(shard_shape(rule, shards, padded or DIMS.vocab), dtype=torch.long)
    whole = whole_tensors(rule)
    for piece in pieces(rule, DIMS, shard, tuple(out.shape)):
        piece.of_shard(out, rule).copy_(piece.of_whole(whole[piece.part], rule))
    return out


def test_linear_qkv_is_interleaved_by_group():
    """megatron-core, attention.py: q1 q2 k1 v1 | q3 q4 k2 v2 | ..."""
    for name in ("weight", "bias"):
        rule = rule_of(f"{LAYER}self_attention.linear_qkv.{name}", DIMS)
        q, k, v = (t.view(4, -1, *t.shape[1:]) for t in whole_tensors(rule))
        whole = torch.cat([torch.cat([q[g], k[g], v[g]]) for g in range(4)])
        for ranks in (1, 2, 4, 8):  # with 8, two ranks share a group
            assert torch.equal(torch.cat([shard_of(rule, r, ranks) for r in range(ranks)]), whole)


def test_linear_fc1_is_gate_then_up_on_every_rank():
    rule = rule_of(f"{LAYER}mlp.linear_fc1.weight", DIMS)
    gate, up = whole_tensors(rule)
    for ranks in (1, 2, 4):
        for r in range(ranks):
            expected = torch.cat([gate.chunk(ranks)[r], up.chunk(ranks)[r]])
            assert torch.equal(shard_of(rule, r, ranks), expected)


def test_columns_and_vocabulary():
    rule = rule_of(f"{LAYER}self_attention.linear_proj.weight", DIMS)
    assert axis(rule) == 1 and torch.equal(torch.cat([shard_of(rule, r, 4) for r in range(4)], 1), whole_tensors(rule)[0])
    rule = rule_of("embedding.word_embeddings.weight", DIMS)
    shards = [shard_of(rule, r, 4, padded=24) for r in range(4)]  # 11 rows: the second rank has 5 of its 6, the others none
    whole = torch.cat(shards)
    assert torch.equal(whole[:11], whole_tensors(rule)[0]) and not whole[11:].any()
    assert pieces(rule, DIMS, 3, (6, 6)) == []
    assert shards_of(rule_of("decoder.final_layernorm.weight", DIMS), 4) == 1


def test_an_uneven_cut_is_refused():
    with pytest.raises(WeightsError, match="up|gate.*multiple of 3"):
        shard_shape(rule_of(f"{LAYER}mlp.linear_fc1.weight", DIMS), 3, 11)
