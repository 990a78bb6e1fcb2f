"""Our norms in megatron-core's local layers: in every slot, tagged, and right under sequence parallelism."""


import pytest
import torch

from megatron_plugin.hooks.local_spec import LayerNorm, RMSNorm, local_block_spec
from tests.hooks.ranks import config_of
from tests.spawn import on_ranks

RANKS = "tests.hooks.ranks"
OURS = "megatron_plugin.hooks.local_spec."


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_parameters_carry_the_tag(norm, sequence_parallel):
    config = config_of(2, sequence_parallel=sequence_parallel, params_dtype=torch.bfloat16)
    parameters = list(norm(config, 16, eps=1e-6).parameters())
    assert len(parameters) == (1 if norm is RMSNorm else 2)
    assert all(p.sequence_parallel is sequence_parallel and p.dtype == torch.bfloat16 for p in parameters)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("qk_layernorm", [True, False])
def test_every_norm_is_ours(normalization, qk_layernorm):
    found, tags = on_ranks(2, RANKS, "slots", qk_layernorm=qk_layernorm, normalization=normalization)[0]
    built = {name for name, kind in found.items() if not kind.endswith(".IdentityOp")}
    inside = ["input_layernorm", "pre_mlp_layernorm"] + ["self_attention.q_layernorm", "self_attention.k_layernorm"] * qk_layernorm
    assert built == {f"decoder.layers.{i}.{slot}" for i in range(2) for slot in inside} | {"decoder.final_layernorm"}
    assert {found[name] for name in built} == {OURS + normalization}
    assert tags and all(tag is True for tag in tags.values())


@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_same_gradients_in_every_layout(qk_layernorm):
    """DP2, TP2 and TP2 with SP see the same two batches.  Without the tag the norms' gradients under SP would be each rank's part.
    Measured: at most 6e-11 between layouts, on gradients whose largest entries are 1e-5 to 3e-4."""
    layouts = [{"tensor": 1}, {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}]
    results = [on_ranks(2, RANKS, "one_layout", **layout, qk_layernorm=qk_layernorm, normalization="RMSNorm") for layout in layouts]
    means, norms, rates, grad_norm = results[0][0]
    assert means["num_tokens"] == 8 + 2 + 8 + 5 and len(norms) == (9 if qk_layernorm else 5)
    for layout, ranks in zip(layouts, results, strict=True):
        for rank_means, rank_norms, _, rank_grad_norm in ranks:
            assert rank_means == pytest.approx(means, rel=1e-5, abs=1e-6), layout
            assert rank_grad_norm == pytest.approx(grad_norm, rel=1e-5), layout
            for name, grad in norms.items():
                torch.testing.assert_close(rank_norms[name], grad, atol=3e-10, rtol=0, msg=lambda m, n=name, at=layout: f"{at} {n}: {m}")
                assert grad.abs().max() > 1e-5, "a gradient of nothing proves nothing"
    assert rates == pytest.approx([1e-4, 1e-3, 5.5e-4]), "no wasted first step, and no None after the warm-up"


@pytest.mark.parametrize(
    "field, value",
    [("num_moe_experts", 4), ("multi_latent_attention", True), ("layernorm_zero_centered_gamma", True)],
)
def test_what_the_local_layers_cannot_do(field, value):
    config = config_of()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=f"got {field}={value}, expected .* without Transformer Engine"):
        local_block_spec(config)
    config = config_of()
    config.context_parallel_size, config.window_size = 2, (8, 0)
    with pytest.raises(ValueError, match=r"got window_size=\(8, 0\) with context parallelism, expected None"):
        local_block_spec(config)
    config = config_of()
    config.normalization = "L2Norm"
    with pytest.raises(ValueError, match="got normalization='L2Norm', expected one of RMSNorm, LayerNorm"):
        local_block_spec(config)
