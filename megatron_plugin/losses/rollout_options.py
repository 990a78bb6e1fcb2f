"""What every policy-gradient loss takes beside its own parameters: a KL to the reference and a weight for rollout-trainer mismatch.

T: tokens of this call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_plugin.losses.algebra import INF, check_choice, check_number, is_neutral, of_tokens
from megatron_plugin.losses.contract import LossFunction, TokenInputs, TokenStats, TokenTerms
from megatron_plugin.losses.kl import KL_ESTIMATORS, kl_estimate
from megatron_plugin.losses.mismatch import mismatch_weight

__all__ = ["with_rollout_options"]

OPTIONS = ("kl", "kl_estimator", "tis", "icepop_low", "icepop_high")


def with_rollout_options(*, prefix: str = "") -> Callable[[LossFunction], LossFunction]:
    """Decorator: the loss with five more keyword parameters, each without effect at its default; expert tokens are left alone.

    kl             coefficient of an estimate of KL(policy || reference), added to the loss (needs inputs.ref_logp)         0.0
    kl_estimator   k1, k2, k3, k1+ or k3+ (losses/kl.py)                                                                   "k3"
    tis            the loss times min(p_old / p_rollout, tis), detached (needs inputs.rollout_logp)                         inf
    icepop_low     the loss of a token with p_old / p_rollout outside [icepop_low, icepop_high] is 0, of others it is        0.0
    icepop_high    multiplied by that ratio (both as losses/mismatch.py; the KL and the regularisers are not multiplied)    inf

    Without inputs.old_logp, p_old is the current policy.  Metrics, of options that are on only: kl (without its coefficient), mismatch
    (the weight), mismatch_cut (1 where truncated or dropped), with `prefix` in front.
    """

    def decorate(fn: LossFunction) -> LossFunction:
        @functools.wraps(fn, assigned=("__module__", "__name__", "__qualname__", "__doc__"))  # not its annotations: these are of another signature
        def loss(
            stats: TokenStats,
            inputs: TokenInputs,
            *,
            kl: float | Tensor = 0.0,
            kl_estimator: str = "k3",
            tis: float | Tensor = INF,
            icepop_low: float | Tensor = 0.0,
            icepop_high: float | Tensor = INF,
            **own: float | str | Tensor,
        ) -> TokenTerms:
            name = fn.__name__
            _check(name, kl, kl_estimator, tis, icepop_low, icepop_high)
            terms = fn(stats, inputs, **own)
            if not (is_neutral(tis, INF) and is_neutral(icepop_low, 0.0) and is_neutral(icepop_high, INF)):
                terms = _weighted(name, prefix, terms, stats, inputs, tis=tis, icepop_low=icepop_low, icepop_high=icepop_high)
            if not is_neutral(kl, 0.0):
                terms = _anchored(name, prefix, terms, stats, inputs, kl, kl_estimator)
            return terms

        signature = inspect.signature(fn)
        added = [p for p in inspect.signature(loss, follow_wrapped=False).parameters.values() if p.name in OPTIONS]
        loss.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]  # what inspect reads
        return loss

    return decorate


def _check(name, kl, kl_estimator, tis, icepop_low, icepop_high) -> None:
    check_number(name, "kl", kl, low=0)
    check_choice(name, "kl_estimator", kl_estimator, KL_ESTIMATORS)
    check_number(name, "tis", tis, above=0, infinite=True)
    check_number(name, "icepop_low", icepop_low, low=0)
    check_number(name, "icepop_high", icepop_high, low=0 if isinstance(icepop_low, Tensor) else icepop_low, infinite=True)


def _weighted(name: str, prefix: str, terms: TokenTerms, stats: TokenStats, inputs: TokenInputs, **bounds: float | Tensor) -> TokenTerms:
    old_logp_T = stats.logp if inputs.old_logp is None else inputs.old_logp
    weight_T, cut_T = (x.to(stats.logp.dtype) for x in mismatch_weight(old_logp_T, inputs.require("rollout_logp", name), **bounds))
    factor_T = _on_rollouts(inputs, weight_T, 1.0)
    found = {f"{prefix}mismatch": _on_rollouts(inputs, weight_T, 0.0), f"{prefix}mismatch_cut": _on_rollouts(inputs, cut_T, 0.0)}
    weight = None if terms.weight is None else factor_T * terms.weight
    return TokenTerms(loss=factor_T * terms.loss, weight=weight, metrics={**terms.metrics, **found})


def _anchored(
    name: str, prefix: str, terms: TokenTerms, stats: TokenStats, inputs: TokenInputs, coefficient: float | Tensor, estimator: str
) -> TokenTerms:
    ref_logp_T = inputs.require("ref_logp", name).to(stats.logp.dtype)
    kept = stats if inputs.expert is None else of_tokens(~inputs.expert.bool(), stats)
    kl_T = _on_rollouts(inputs, kl_estimate(kept.logp, ref_logp_T, estimator), 0.0)
    return terms._replace(loss=terms.loss + coefficient * kl_T, metrics={**terms.metrics, f"{prefix}kl": kl_T.detach()})


def _on_rollouts(inputs: TokenInputs, values_T: Tensor, elsewhere: float) -> Tensor:
    return values_T if inputs.expert is None else torch.where(inputs.expert.bool(), elsewhere, values_T)
