"""Post-training losses at pretraining scale.  Public names are resolved on first use: importing the package imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # _HOME again, for type checkers and editors, which do not run __getattr__
    from megatron_plugin.hooks.attach import attach as attach
    from megatron_plugin.kernels.main_grad import MainGrad as MainGrad
    from megatron_plugin.kernels.token_stats import TokenStats as TokenStats
    from megatron_plugin.losses import LOSSES as LOSSES
    from megatron_plugin.losses.binding import bind as bind
    from megatron_plugin.losses.contract import TokenInputs as TokenInputs
    from megatron_plugin.losses.contract import TokenLoss as TokenLoss
    from megatron_plugin.losses.contract import TokenTerms as TokenTerms
    from megatron_plugin.losses.reduction import LossOutput as LossOutput
    from megatron_plugin.ops import Head as Head
    from megatron_plugin.ops import Plan as Plan
    from megatron_plugin.ops import TensorParallel as TensorParallel
    from megatron_plugin.ops import linear_token_loss as linear_token_loss
    from megatron_plugin.ops import linear_token_stats as linear_token_stats
    from megatron_plugin.ops import token_loss as token_loss
    from megatron_plugin.ops import token_stats as token_stats
    from megatron_plugin.schedules.mu import mu_schedule as mu_schedule

_HOME = {
    "TokenStats": "kernels.token_stats",
    "TokenInputs": "losses.contract",
    "TokenTerms": "losses.contract",
    "TokenLoss": "losses.contract",
    "LOSSES": "losses",
    "bind": "losses.binding",
    "mu_schedule": "schedules.mu",
    "LossOutput": "losses.reduction",
    "token_stats": "ops",
    "token_loss": "ops",
    "linear_token_stats": "ops",
    "linear_token_loss": "ops",
    "TensorParallel": "ops",
    "Head": "ops",
    "Plan": "ops",
    "MainGrad": "kernels.main_grad",
    "attach": "hooks.attach",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'megatron_plugin' has no attribute '{name}'; public names: {', '.join(__all__)}")
    return getattr(import_module(f"megatron_plugin.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
