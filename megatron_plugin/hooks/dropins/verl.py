"""verl: a policy loss for its registry, and a loss function for its engines.

    register_policy_loss("dual_clip")(policy_loss("grpo", clip_low=0.2, clip_high=0.28))        # then actor.policy_loss.loss_mode=dual_clip
    training_client.set_loss_fn(loss_fn=partial(engine_loss("dft"), config=None))               # in the place of verl's sft_loss

Both start from verl's own log-probabilities, so its engines, FSDP and Megatron, and its aggregation stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenLoss, TokenStats

__all__ = ["engine_loss", "policy_loss"]


def policy_loss(loss: str | Callable | TokenLoss, **params: float | str | Tensor) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """For `verl.trainer.ppo.core_algos.register_policy_loss(name)`.

    All tensors are [b, s].  The loss finds advantage and old_logp in its inputs; rollout_is_weights multiply its terms, and verl's agg_loss
    reduces them by its loss_agg_mode and the counts of the global batch.  ValueError for a loss that needs more than that, such as the entropy."""
    bound = bind(loss, **params)
    if _reads_entropy(bound, ("advantage", "old_logp")):
        raise ValueError(f"loss '{bound.name}' reads the entropy, which verl does not give to its policy losses; choose one of log-probabilities")

    def compute(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean", config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        from verl.trainer.ppo.core_algos import agg_loss

        live = response_mask.bool()
        inputs = TokenInputs(advantage=advantages, old_logp=old_log_prob)
        terms = _terms(bound, log_prob, None, live, inputs)
        loss_bs = terms["loss"] if rollout_is_weights is None else terms["loss"] * rollout_is_weights
        count = live.sum().clamp(min=1)
        metrics = {f"actor/{name}": float(value.detach().sum() / count) for name, value in terms.items() if name != "loss"}
        counts = {} if config is None else config.global_batch_info
        return agg_loss(loss_mat=loss_bs, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **counts), metrics

    return compute


def engine_loss(loss: str | Callable | TokenLoss, **params: float | str | Tensor) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """loss_function(config, model_output, data, dp_group=None) for verl's engines, normalised as verl's sft_loss: over the tokens of all
    data-parallel ranks and micro-batches (batch_num_tokens), times dp_size because the engine averages over ranks.

    model_output["log_probs"]: nested [b, j] with data["loss_mask"] nested beside it, or [b, s] with data["response_mask"].
    A loss of the entropy needs model_output["entropy"], which the engine makes when data has calculate_entropy; ValueError without it."""
    bound = bind(loss, **params)
    needs_entropy = _reads_entropy(bound, ())

    def compute(config: Any, model_output: Mapping[str, Tensor], data: Mapping[str, Any], dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
        logp, entropy = model_output["log_probs"], model_output.get("entropy")
        if needs_entropy and entropy is None:
            raise ValueError(f"loss '{bound.name}' reads the entropy and model_output has none: set calculate_entropy=True in the batch")
        if logp.is_nested:
            live = data["loss_mask"].values().roll(-1, dims=0).bool()  # position i predicts token i + 1, as in verl's sft_loss
            logp, entropy = logp.values(), None if entropy is None else entropy.values()
        else:
            live = data["response_mask"].bool()
        terms = _terms(bound, logp, entropy, live, TokenInputs())
        return terms["loss"].sum() / data["batch_num_tokens"] * data["dp_size"], {}

    return compute


def _terms(loss: TokenLoss, logp: Tensor, entropy: Tensor | None, live: Tensor, inputs: TokenInputs) -> dict[str, Tensor]:
    """Loss, weight and metrics of every token, in the shape of logp, 0 where not live."""
    stats = TokenStats(*(torch.zeros_like(logp) if x is None else x.masked_fill(~live, 0.0) for x in (logp, entropy, None)))
    given: dict[str, Any] = {name: x.masked_fill(~live, 0.0) for name, x in inputs.tensors().items()}
    inputs = TokenInputs(coefficient=live.float(), **given)
    terms = loss(stats, inputs)
    found = {"loss": terms.loss} | ({} if terms.weight is None else {"weight": terms.weight}) | dict(terms.metrics)
    return {name: value.masked_fill(~live, 0.0) for name, value in found.items()}


def _reads_entropy(loss: TokenLoss, available: tuple[str, ...]) -> bool:
    """Found out by trying: without the entropy, are the terms still numbers?  ValueError for a loss that needs inputs not `available`."""
    logp, unknown = torch.tensor([-0.1, -2.0]), torch.full((2,), torch.nan)
    values: dict[str, Any] = {"advantage": torch.ones(2), "old_logp": logp}
    terms = loss(TokenStats(logp, unknown, unknown), TokenInputs(coefficient=torch.ones(2), **{name: values[name] for name in available}))
    return not terms.loss.isfinite().all()
