"""Megatron-LM's pretrain() with our losses: in a copy of pretrain_gpt.py two arguments change.

    from megatron_plugin.hooks.dropins import megatron_lm
    pretrain(..., megatron_lm.with_plugin(forward_step), ..., extra_args_provider=megatron_lm.extra_args_provider)

and the command line says `--plugin-config dft.yaml --calculate-per-token-loss`.  Without --plugin-config the script does what it did.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_plugin.config import ConfigError, as_config_error
from megatron_plugin.config.plugin import load_plugin_config
from megatron_plugin.hooks.dropins.schedule import with_loss
from megatron_plugin.losses.binding import bind
from megatron_plugin.ops import Head, Plan

__all__ = ["extra_args_provider", "loss_func", "options_of", "with_plugin"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}


def extra_args_provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds --plugin-config.  A file that is not there, or wrong, ends the program with exit code 2 and one line on what to mend.

    Has your script a provider already: extra_args_provider=lambda parser: megatron_lm.extra_args_provider(yours(parser))."""
    group = parser.add_argument_group("megatron-plugin")
    group.add_argument("--plugin-config", type=_checked, metavar="FILE", help="YAML: loss, head, plan, one_pass; without it Megatron's own loss")
    return parser


def with_plugin(forward_step: Callable) -> Callable:
    """pretrain_gpt.py's forward_step(data_iterator, model, return_schedule_plan=False), with the loss of --plugin-config if there is one.

    The arguments are read at its first call; `.detach()` as of `with_loss`."""
    made: list[Callable] = []

    @functools.wraps(forward_step)
    def step(*args: Any, **kwargs: Any) -> tuple[Any, Callable]:
        if not made:
            from megatron.training import get_args  # not there in megatron-core's wheels before 0.17

            path = get_args().plugin_config
            made.append(with_loss(forward_step, **options_of(path)) if path else forward_step)
        return made[0](*args, **kwargs)

    step.detach = lambda: made[0].detach() if made and made[0] is not forward_step else None  # type: ignore[attr-defined]
    return step


def loss_func(loss_mask: Tensor, output_tensor: Tensor, model: torch.nn.Module | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What pretrain_gpt.py's loss_func computes, for scripts that have none: (sum, tokens, {"lm loss": [sum, tokens]}).

    output_tensor, loss_mask: [b, s]; model: not used, it is there because Megatron-LM passes it."""
    mask = loss_mask.reshape(-1).float()
    total, count = (output_tensor.reshape(-1).float() * mask).sum(), mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def options_of(path: str) -> dict[str, Any]:
    """The file as keyword arguments of `attach`.  ConfigError for what is wrong with it."""
    config = load_plugin_config(path)
    with as_config_error("loss", path):
        bound = bind(config.loss["name"], **{key: value for key, value in config.loss.items() if key != "name"})
    head = Head(vocab_size=config.head.vocab_size, softcap=config.head.softcap, temperature=config.head.temperature)
    plan = Plan(chunk_tokens=config.plan.chunk_tokens, logits_dtype=DTYPES[config.plan.logits_dtype], min_weight=config.plan.min_weight)
    return {"loss": bound, "head": head, "plan": plan, "one_pass": config.one_pass}


def _checked(path: str) -> str:
    """The path itself: Megatron-LM stores its arguments in checkpoints, which must load without this package."""
    try:
        options_of(path)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path
