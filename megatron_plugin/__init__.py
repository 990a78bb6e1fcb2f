"""Post-training losses at pretraining scale.  Public names are resolved on first use: importing the package imports no torch."""

from importlib import import_module

__version__ = "0.1.0"

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


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'megatron_plugin' has no attribute '{name}'; public names: {', '.join(__all__)}")
    return getattr(import_module(f"megatron_plugin.{_HOME[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
