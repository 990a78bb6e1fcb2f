"""What goes back to megatron-core from a loss_func, what must be switched on for it, and the means of what was reported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch import distributed as dist

from megatron_plugin.losses.cll import cll_counts
from megatron_plugin.losses.probability import probability_counts
from megatron_plugin.losses.reduction import LossOutput

__all__ = ["check_normalised_per_step", "check_will_be_divided", "loss_scale", "metric_pairs", "report", "token_means"]


def report(loss_sum: Tensor, output: LossOutput, *, num_tokens: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """megatron-core's three-tuple: (loss sum 0-d with gradient, tokens 0-d int32, {name: [sum, tokens]}, Megatron's convention).

    Names: "lm loss", the loss as trained, and nll, token_prob, entropy, weight, ... in nats: plain sums over loss tokens, whatever the loss.
    num_tokens: what megatron-core shall divide by where that is not the number of loss tokens (mixture of experts, parallel/README.md)."""
    pairs = {"lm loss": torch.stack([loss_sum.detach().float(), output.num_tokens.float()])} | metric_pairs(output)
    return loss_sum, output.num_tokens if num_tokens is None else num_tokens, pairs


def metric_pairs(output: LossOutput) -> dict[str, Tensor]:
    """{name: [sum, tokens]} of everything measured but the loss itself, and how many tokens are how surprising (losses/cll.py) and how probable."""
    count = output.num_tokens.float()
    logp, entropy = output.per_token.logp, output.per_token.entropy
    sums = output.metric_sums | cll_counts(logp, entropy) | probability_counts(logp)
    return {name: torch.stack([value.float(), count]) for name, value in sums.items() if name != "loss"}


def check_normalised_per_step(config: TransformerConfig) -> None:
    """ValueError when `config` would make megatron-core average means instead of dividing once per step."""
    if not config.calculate_per_token_loss:
        # With the flag off, megatron-core averages the means of ranks and micro-batches: 0.86455 instead of 0.86278 in the gradient norm
        # of two DP ranks with unequal masks, and Adam with clipping hides it.
        raise ValueError(
            "got config.calculate_per_token_loss=False, expected True: with it off, tokens of short sequences weigh more than those of "
            "long ones; set it in TransformerConfig before DistributedDataParallel is built (--calculate-per-token-loss in Megatron-LM)"
        )


def check_will_be_divided(config: TransformerConfig) -> None:
    """ValueError in a training step whose gradient nobody would divide by the number of tokens."""
    if torch.is_grad_enabled() and config.finalize_model_grads_func is None:
        raise ValueError(
            "got config.finalize_model_grads_func=None, expected a function that divides the gradient by num_tokens: this loss_func "
            "returns a sum; set it to megatron.core.distributed.finalize_model_grads, or evaluate under torch.no_grad()"
        )


def loss_scale(config: TransformerConfig, device: torch.device) -> float | Tensor:
    """What the schedule will multiply the loss with before the backward: gradients formed in the forward carry it, or fp16 ones would vanish."""
    if config.grad_scale_func is None or not torch.is_grad_enabled():
        return 1.0
    scale = config.grad_scale_func(torch.ones((), device=device))
    return scale.detach().float().reshape(()) if isinstance(scale, Tensor) else float(scale)


def token_means(reports: Sequence[dict[str, Tensor]], *, group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """Token means of a step from the reports of its micro-batches, summed over `group` (DP with CP): one all-reduce, one host sync.

    Returns {name: mean} and "num_tokens"; {} where there are no reports (every pipeline stage but the last); nan if no token was live."""
    if not reports:
        return {}
    names = list(reports[0])
    total = torch.stack([torch.stack([report[name] for name in names]) for report in reports]).double().sum(0)  # [names, 2]
    if group is not None:
        dist.all_reduce(total, group=group)
    sums, counts = total.T.tolist()
    means = {name: value / count if count else float("nan") for name, value, count in zip(names, sums, counts, strict=True)}
    return means | {"num_tokens": counts[0]}
