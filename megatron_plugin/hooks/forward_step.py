"""Our losses as megatron-core's `loss_func`, for a model that gives logits (hooks/attach.py: from hidden states, without them).

    loss_func = make_loss_func("dft", config, vocab_size=151936)

    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        logits = model(batch["tokens"], batch["position_ids"], None)          # no labels: [b, s, V/tp] comes back
        return logits, partial(loss_func, labels=batch["labels"], loss_mask=batch["loss_mask"])

Normalisation (parallel/README.md): the local (sum, count) is returned; megatron-core sums counts over micro-batches, DP and CP and divides
the gradient once, in finalize_model_grads.  Nothing of ours is all-reduced, and every token of the step weighs the same in every layout.
b sequences of a micro-batch, s tokens of a sequence, V/tp columns of the vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch import distributed as dist

from megatron_plugin.hooks.report import check_normalised_per_step, check_will_be_divided, loss_scale, report
from megatron_plugin.losses.binding import bind
from megatron_plugin.losses.contract import TokenInputs, TokenLoss
from megatron_plugin.ops import token_loss

__all__ = ["make_loss_func", "masked_inputs"]

LossFunc = Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]


def make_loss_func(
    loss: str | Callable | TokenLoss,
    config: TransformerConfig,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    overwrite_logits: bool = False,
    **params: float | str | Tensor,
) -> LossFunc:
    """A megatron-core loss_func for any loss of LOSSES, a dotted path to your own, or a function.

    loss_func(logits, *, labels, loss_mask=None, inputs=None) -> (loss sum, num_tokens, report):
      logits [b, s, V/tp], what GPTModel(parallel_output=True) returns without labels; labels [b, s], already shifted; loss_mask [b, s],
      0 takes a token out of everything; inputs: TokenInputs with fields of [b, s], for the losses that need them
      loss sum: 0-d with gradient; num_tokens: 0-d int32, the live tokens; report: {name: [sum, num_tokens]}, Megatron's convention, for
      "lm loss" (the loss as trained) and nll, token_prob, entropy, weight, ... (nats; plain means over tokens, whatever the loss)

    `vocab_size` is the true vocabulary: columns at or beyond it are padding.  `tp_group` defaults to megatron-core's.  `params` are the
    loss's own parameters.  ValueError when `config` would make megatron-core normalise in another way.
    """
    _check(config)
    tp_group = parallel_state.get_tensor_model_parallel_group() if tp_group is None else tp_group
    if tp_group.size() != config.tensor_model_parallel_size:
        raise ValueError(
            f"got a tp_group of {tp_group.size()} ranks, expected tensor_model_parallel_size={config.tensor_model_parallel_size}; "
            "pass the group the model was built with"
        )
    bound = bind(loss, **params)
    options: dict[str, Any] = {"tp_group": tp_group, "vocab_size": vocab_size, "temperature": temperature, "overwrite_logits": overwrite_logits}

    def loss_func(logits: Tensor, *, labels: Tensor, loss_mask: Tensor | None = None, inputs: TokenInputs | None = None):
        check_will_be_divided(config)
        scale = loss_scale(config, logits.device)
        output = token_loss(logits, labels, bound, inputs=masked_inputs(inputs, loss_mask), grad_scale=scale, **options)
        return report(output.loss_sum, output)

    return loss_func


def masked_inputs(inputs: TokenInputs | None, loss_mask: Tensor | None) -> TokenInputs:
    """Megatron's loss_mask is our coefficient: 0 masks the token, any other value weights it."""
    inputs = TokenInputs() if inputs is None else inputs
    if loss_mask is None:
        return inputs
    if inputs.coefficient is None:
        return replace(inputs, coefficient=loss_mask)
    return replace(inputs, coefficient=torch.where(loss_mask == 0, 0.0, inputs.coefficient * loss_mask))  # 0 * NaN would not mask


def _check(config: TransformerConfig) -> None:
    check_normalised_per_step(config)
    if config.mtp_num_layers:
        raise ValueError(
            f"got config.mtp_num_layers={config.mtp_num_layers}, expected None: this loss_func takes logits, so the model is called "
            "without labels, and then megatron-core's MTP layers get no loss (up to 0.16 they crash); use megatron_plugin.attach"
        )
