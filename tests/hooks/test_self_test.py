"""The start-up check of the normalisation: silent on every layout of the real megatron-core, and it names the factor of a fork's fault."""

import re

import pytest

from tests.spawn import on_ranks

RANKS = "tests.hooks.self_test_ranks"
SHARDED = {"use_distributed_optimizer": True}
BOTH_WAYS = {"overlap_p2p_comm": True, "batch_p2p_comm": False}  # what interleaving needs with two stages, see the last test but one

RIGHT = {
    "one rank": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"layout": {"tensor": 2}}),
    "PP2": (2, {"layout": {"pipeline": 2}}),
    "PP2xVPP2": (2, {"layout": {"pipeline": 2, "virtual": 2}, "fields": BOTH_WAYS}),
    "PP2, one chunk interleaved": (2, {"layout": {"pipeline": 2, "virtual": 1}}),
    "PP4xVPP2": (4, {"layout": {"pipeline": 4, "virtual": 2}}),
    "CP2": (2, {"layout": {"context": 2}}),
    "CP2xDP2, overlapped reduction": (4, {"layout": {"context": 2}, "ddp": {"overlap_grad_reduce": True}}),
    "TP2xCP2+SP": (4, {"layout": {"tensor": 2, "context": 2}, "fields": {"sequence_parallel": True}}),
    "PP2xDP2, distributed optimizer": (4, {"layout": {"pipeline": 2}, "ddp": SHARDED}),
    "PP2xVPP2xDP2, distributed optimizer, everything overlapped":
        (4, {"layout": {"pipeline": 2, "virtual": 2}, "fields": BOTH_WAYS,
             "ddp": SHARDED | {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "DP2, bf16, NaN checks": (2, {"fields": {"bf16": True}, "ddp": {"check_for_nan_in_grad": True, "grad_reduce_in_fp32": True}}),
    "DP2, fp16 loss scale": (2, {"fields": {"fp16": True}}),
    "DP2, MTP": (2, {"fields": {"mtp_num_layers": 1}}),
    "DP2, MoE": (2, {"fields": {"num_moe_experts": 4, "moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}}),
}  # fmt: skip


@pytest.mark.parametrize("layout", RIGHT)
def test_silent_where_right_and_nothing_is_touched(layout):
    size, arguments = RIGHT[layout]
    for error, seconds, untouched in on_ranks(size, RANKS, "check", **arguments):
        assert error is None
        assert untouched, "config, ddp_config or a random state changed"
        assert seconds < 1


CP2, PP2 = {"layout": {"context": 2}}, {"layout": {"pipeline": 2}}
OFF = {"fields": {"calculate_per_token_loss": False}}
WRONG = {
    "flag off, DP2": (2, OFF, "the mean of every micro-batch's own mean; .* set calculate_per_token_loss=True"),
    "flag off, CP2 in an old version": (2, CP2 | OFF | {"fault": "times cp"}, "own mean, times context_parallel_size; .* set calculate_per_token_loss"),
    "x CP": (2, CP2 | {"fault": "times cp"}, "got 2 times .* expected 1 .* 2 = context_parallel_size; .* the schedule rescales the loss"),
    "x CP, DP2": (4, CP2 | {"fault": "cp over micro-batches"}, "context_parallel_size / num_microbatches"),
    "/ M, PP2": (2, PP2 | {"fault": "divided by micro-batches"}, "0.333333 = 1 / num_microbatches; .* the schedule rescales"),
    "no division": (2, {"fault": "undivided"}, "21 = num_tokens; .* set config.finalize_model_grads_func"),
    "no division, PP2, distributed optimizer": (4, PP2 | {"ddp": SHARDED, "fault": "undivided"}, "= num_tokens; "),
    "divided twice": (2, {"fault": "divided twice"}, "= 1 / num_tokens; "),
    "averaging DDP": (2, {"fault": "averaging ddp"}, "0.5 = 1 / data_parallel_size; .* averages over ranks"),
    "averaging DDP, CP2, distributed optimizer":
        (4, CP2 | {"ddp": SHARDED, "fault": "averaging ddp"}, r"0.25 = 1 / \(context_parallel_size \* data_parallel_size\)"),
    "no clamp": (2, {"fault": "no clamp"}, "nan = 0 / 0, a micro-batch without loss tokens .* must leave the sum"),
    "a factor of nobody's": (1, {"fault": "some other factor"}, "1.3 = no product of sizes of the layout; .* compare the schedule"),
    "the last of two ranks only": (2, {"fault": "one rank only"}, "no product of sizes"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_factor_is_named_on_every_rank(fault):
    size, arguments, message = WRONG[fault]
    answers = on_ranks(size, RANKS, "check", **arguments)
    assert len({error for error, _, _ in answers}) == 1
    for error, _, untouched in answers:
        assert error.startswith("RuntimeError: got ") and re.search(message, error), error
        assert untouched


def test_a_loss_scale_applied_twice_is_named():
    """fp16: the schedule scales through grad_scale_func; a fork that scales in the loss as well is off by the scale."""
    (error, _, _), _ = on_ranks(2, RANKS, "check", fields={"fp16": True}, fault="scaled twice")
    assert "1000 = loss scale" in error and "applied once" in error


def test_interleaving_over_two_stages_with_batched_messages_is_caught():
    """megatron-core's default mixes up activations and gradients between two interleaved stages (Megatron-LM's arguments forbid it)."""
    for error, _, _ in on_ranks(2, RANKS, "check", layout={"pipeline": 2, "virtual": 2}):
        assert "no product of sizes" in error and "set overlap_p2p_comm=True and batch_p2p_comm=False" in error


def test_megatron_fsdp_is_refused():
    ((error, _, _),) = on_ranks(1, RANKS, "check", ddp={"use_megatron_fsdp": True})
    assert error.startswith("ValueError: got use_megatron_fsdp=True, expected False")
