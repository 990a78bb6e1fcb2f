"""What every loss takes and returns.  T: tokens of this call (flattened, pre-shifted labels)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_plugin.kernels.objective import COLUMNS
from megatron_plugin.kernels.token_stats import TokenStats
from megatron_plugin.losses.regularisers import REGULARISERS

__all__ = ["BASE_METRICS", "TermsError", "TokenInputs", "TokenLoss", "TokenStats", "TokenTerms", "check_terms"]

BASE_METRICS = ("loss", "nll", "token_prob", "entropy", "cll", "weight", "weight_sq")
"""Summed over live tokens for every loss, beside its own.  Over num_tokens they are means; weight_ess = weight^2 / weight_sq, in tokens."""


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """What is known about each token before the forward.  Every field is [T] and carries no gradient; None when unused."""

    coefficient: Tensor | None = None
    """fp32.  mask x data weight x source weight (mu, 1-mu) x normaliser: multiplies the loss and its gradient, not the metrics.
    A token whose coefficient is 0 is masked: its loss and gradient are exactly 0, whatever its logits hold.
    A loss always finds it set: 0 in masked rows (whose statistics are 0 too), 1 elsewhere when none was given."""
    expert: Tensor | None = None
    """bool.  True where the token comes from an expert demonstration, False where from our own rollouts."""
    advantage: Tensor | None = None
    """fp32.  Advantage of the response the token belongs to."""
    old_logp: Tensor | None = None
    """fp32, nats.  log-probability under the policy that was current when the optimiser step began (trainer's own)."""
    rollout_logp: Tensor | None = None
    """fp32, nats.  log-probability reported by the rollout engine."""
    ref_logp: Tensor | None = None
    """fp32, nats.  log-probability under the frozen reference policy."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Inputs without a field of their own, by name: those of user-defined losses; `sequence` (gspo), `reward` and `entropy` (srft)."""

    def require(self, name: str, loss: str) -> Tensor:
        """The field `name`, or 'extra.<key>'; ValueError naming the loss that needs it when it is missing."""
        if name.startswith("extra."):
            key = name.removeprefix("extra.")
            if key in self.extra:
                return self.extra[key]
            given = f"{{'{key}': ...}}"
            raise ValueError(f"loss '{loss}' needs inputs.{name} (one value per token) and got none; pass inputs=TokenInputs(extra={given})")
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"loss '{loss}' needs inputs.{name} (one value per token) and got None; pass inputs=TokenInputs({name}=...)")
        return value

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are set, by name ('extra.<key>' for user inputs)."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {k: v for k, v in plain.items() if v is not None} | {f"extra.{k}": v for k, v in self.extra.items()}

    def map(self, fn: Callable[[Tensor], Tensor]) -> TokenInputs:
        """The same inputs with `fn` applied to every tensor (flatten, slice, move)."""
        plain = {k: fn(v) for k, v in self.tensors().items() if not k.startswith("extra.")}
        return TokenInputs(**plain, extra={k: fn(v) for k, v in self.extra.items()})


class TokenTerms(NamedTuple):
    """One loss term per token, before coefficient and reduction."""

    loss: Tensor
    """[T] fp32, differentiable through stats.logp, stats.entropy and stats.lse."""
    weight: Tensor | None = None
    """[T] fp32, detached: the factor in front of -logp.  None means 1, or that the method has no such factor."""
    metrics: Mapping[str, Tensor] = {}
    """[T] fp32 each, detached: summed over live tokens for the log.  One called expert/... or rollout/... is 0 on the tokens of the other
    source: its mean is the sum over the number of live tokens of its own source, not over all."""


class TermsError(ValueError):
    """What a loss returned is not one term per token."""


def check_terms(terms: TokenTerms, shape: torch.Size, name: str = "(unnamed)") -> None:
    """TermsError unless loss, weight and metrics have `shape` and no metric takes a name of BASE_METRICS.  Shapes only, nothing is read."""
    if not isinstance(terms, TokenTerms):
        raise TermsError(f"loss '{name}' returned {type(terms).__name__}, expected TokenTerms(loss=..., weight=..., metrics={{...}})")
    if taken := sorted(set(terms.metrics) & ({*BASE_METRICS, *COLUMNS} - set(REGULARISERS))):
        raise TermsError(f"loss '{name}' returned a metric called '{taken[0]}', which is reported for every loss; rename it")
    weight = {} if terms.weight is None else {"weight": terms.weight}
    for key, value in {"loss": terms.loss, **weight, **terms.metrics}.items():
        if not isinstance(value, Tensor) or value.shape != shape:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TermsError(
                f"loss '{name}' returned '{key}' of {got} for tokens of shape {list(shape)}, expected one value per token; "
                "do not sum, average or mask inside the loss: coefficient and reduction come after it"
            )


LossFunction = Callable[..., TokenTerms]


@dataclass(frozen=True)
class TokenLoss:
    """A loss function with its parameters.  Make one with `bind`."""

    fn: LossFunction
    """fn(stats, inputs, **params) -> TokenTerms."""
    params: Mapping[str, float | str | Tensor] = field(default_factory=dict)
    """Numbers, or 0-d tensors where a value changes each step without recompiling (ramps); text where the loss takes a name."""
    regularisers: Mapping[str, float | Tensor] = field(default_factory=dict)
    """Coefficients of regularisers.REGULARISERS added to every token's loss."""
    token_local: bool = True
    """True when each token's term depends on that token alone, so gradients may be formed inside the forward."""
    twin: Callable | str | None = None
    """The same loss as a @triton.jit function (kernels/weighting.py), or its dotted path; None: its terms are formed in PyTorch on [T] vectors."""
    twin_params: tuple[str, ...] | None = None
    """The parameters that the twin takes; None: all.  With another one away from its default the twin is another loss, and is not used."""
    bound: bool = False
    """Set by `bind`: parameters checked and token_local probed, so binding again costs nothing."""
    tried: dict = field(default_factory=dict, repr=False, compare=False)
    """What probe.own_metrics found out, by the inputs that were given."""

    @property
    def name(self) -> str:
        """The function's name; that of its class for a callable object, which has none of its own."""
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> TokenTerms:
        terms = self.fn(stats, inputs, **self.params)
        check_terms(terms, stats.logp.shape, self.name)  # before a regulariser turns a scalar into [T]
        if taken := sorted(set(terms.metrics) & set(REGULARISERS)):
            raise TermsError(f"loss '{self.name}' returned a metric called '{taken[0]}', the name of a regulariser; rename it")
        for key, coefficient in self.regularisers.items():
            added = REGULARISERS[key](stats, coefficient=coefficient)
            terms = terms._replace(loss=terms.loss + added, metrics={**terms.metrics, key: added.detach()})
        return terms

    def for_vocabulary(self, vocab_size: int) -> TokenLoss:
        """Fill in a parameter called vocab_size (the true vocabulary, without padding) unless the user set it."""
        if "vocab_size" not in inspect.signature(self.fn).parameters or "vocab_size" in self.params:
            return self
        return replace(self, params={**self.params, "vocab_size": vocab_size})
