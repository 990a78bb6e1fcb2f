"""The check of main_grad's books, in the one place that megatron-core calls once per step: config.finalize_model_grads_func."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.transformer import TransformerConfig

from megatron_plugin.hooks.report import check_will_be_divided
from megatron_plugin.kernels.main_grad import MainGrad

__all__ = ["Books"]


class Books:
    """finalize_model_grads, then `MainGrad.finalize` of every ledger.  One object per configuration, however many losses are attached.

    Somebody may wrap it, and it may be called after the last ledger is gone: then it is what it stands for, and no more."""

    def __init__(self, finalize: Callable) -> None:
        self.finalize = finalize
        self.ledgers: list[MainGrad] = []

    @classmethod
    def of(cls, config: TransformerConfig, mine: Books | None) -> Books:
        """The books that `config` calls: `mine`, once there are any; put there where they are not, or no longer.

        ValueError where there is no function that they could stand for."""
        check_will_be_divided(config)
        there = config.finalize_model_grads_func
        if mine is not None and there is not mine.finalize:  # ours, or a wrapper around ours
            return mine
        books = there if isinstance(there, cls) else mine or cls(there)
        config.finalize_model_grads_func = books
        return books

    def remove(self, ledger: MainGrad, config: TransformerConfig) -> None:
        """Forget a ledger; after the last one the configuration is as it was."""
        self.ledgers.remove(ledger)
        if not self.ledgers and config.finalize_model_grads_func is self:
            config.finalize_model_grads_func = self.finalize

    def __call__(self, *args, **kwargs) -> None:
        self.finalize(*args, **kwargs)
        for ledger in self.ledgers:
            ledger.finalize()

    def __reduce__(self):
        """A copy of a configuration, which megatron-core makes for some layers, has what was there before."""
        return _itself, (self.finalize,)


def _itself(finalize: Callable) -> Callable:
    return finalize
