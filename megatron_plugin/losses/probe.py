"""Is a loss token-local?  Found out by trying: f(cat(x, y)) == cat(f(x), f(y)), in values and gradients.  T: tokens of one try."""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_plugin.losses.cll import CLL_METRICS
from megatron_plugin.losses.contract import BASE_METRICS, LossFunction, TermsError, TokenInputs, TokenLoss, TokenStats
from megatron_plugin.losses.probability import PROBABILITY_METRICS

__all__ = ["check_once", "is_token_local", "metric_names", "own_metrics", "saving_as_it_is"]

SPLITS = ((1, 1), (1, 6), (7, 1), (9, 24))
"""Sizes of x and y.  A part of one token is its own mean, quantile and first of a cumsum, which the whole is not; 24 tokens hold groups."""
RTOL, ATOL = 4e-6, 1e-6
"""fp32: vector and scalar forms of exp differ by some 1e-7.  An effect of the neighbours smaller than this is rounding too."""
VOCABULARY = 1000


class _AnyKey(Mapping):
    """inputs.extra with an answer to every key: 0, 1, 2 or 3 per token, so that it serves as weight, mask and group number alike.

    Groups matter: with all values distinct, a mean over tokens of equal `extra['sequence']` would pass for token-local.
    """

    def __init__(self, tokens: int, part: slice = slice(None)):
        self.tokens, self.part = tokens, part

    def __getitem__(self, key: str) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(zlib.crc32(repr(key).encode()))
        return torch.randint(4, (self.tokens,), generator=generator, device="cpu").to(torch.float32)[self.part]

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _plausible(tokens: int) -> tuple[TokenStats, TokenInputs]:
    """Statistics of a model in training and every field of the inputs; its own generator, the global one is not moved."""
    generator = torch.Generator(device="cpu").manual_seed(tokens)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(tokens, generator=generator, device="cpu", dtype=torch.float32)

    def pick(*values: float) -> Tensor:
        index = torch.randint(len(values), (tokens,), generator=generator, device="cpu")
        return torch.tensor(values, device="cpu", dtype=torch.float32)[index]

    logp = -normal(1.5).exp()
    stats = TokenStats(logp=logp, entropy=normal(0.7).exp(), lse=10 + normal(3))
    inputs = TokenInputs(
        coefficient=pick(0.5, 1.0),
        expert=pick(0, 1) > 0,
        advantage=pick(-1.5, -0.5, 0.5, 1.5),  # repeated, as within a response
        old_logp=logp + normal(0.4),  # ratios on both sides of every clip
        rollout_logp=logp + normal(0.4),
        ref_logp=logp + normal(0.4),
        extra=_AnyKey(tokens),
    )
    return stats, inputs


def _part(stats: TokenStats, inputs: TokenInputs, part: slice) -> tuple[TokenStats, TokenInputs]:
    given = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    cut = {name: value[part] for name, value in given.items() if isinstance(value, Tensor)}
    extra = _AnyKey(len(stats.logp), part) if isinstance(inputs.extra, _AnyKey) else {}
    return TokenStats(*(column[part] for column in stats)), TokenInputs(**cut, extra=extra)


def saving_as_it_is() -> saved_tensors_hooks:
    """Context for derivatives taken inside a forward: the hooks of activation checkpointing, which it covers, would drop what is saved here and
    run the whole region again at once to get it back."""
    return saved_tensors_hooks(lambda x: x, lambda x: x)


class _Raised(Exception):
    """The user's function raised; its own error is the cause."""


def _evaluate(loss: TokenLoss, stats: TokenStats, inputs: TokenInputs, upstream_T: Tensor) -> Tensor:
    """[5, T]: loss, weight, and the derivatives of sum(upstream x loss) by logp, entropy, lse.  TermsError for what is not a loss."""
    leaves = TokenStats(*(column.clone().requires_grad_() for column in stats))
    try:
        terms = loss(leaves, inputs)
        if not terms.loss.requires_grad:
            raise TermsError(
                f"loss '{loss.name}' depends on none of stats.logp, stats.entropy and stats.lse: it would train nothing; "
                "detach the weight, not the loss"
            )
        slopes = torch.autograd.grad((upstream_T * terms.loss).sum(), leaves, allow_unused=True, materialize_grads=True)
    except TermsError:
        raise
    except Exception as error:
        raise _Raised from error
    weight_T = torch.ones_like(terms.loss) if terms.weight is None else terms.weight
    return torch.stack([terms.loss, weight_T, *slopes]).detach().to(torch.float32)


def _agrees(loss: TokenLoss, first: int, second: int, *, bare: bool = False) -> bool:
    stats, inputs = _plausible(first + second)
    if bare:
        inputs = TokenInputs()
    # unequal: under equal ones the gradient of a mean over the tokens is 1 each, however many they are
    upstream_T = torch.linspace(0.5, 1.5, first + second, device="cpu", dtype=torch.float32)
    whole = _evaluate(loss, stats, inputs, upstream_T)
    parts = [_evaluate(loss, *_part(stats, inputs, part), upstream_T[part]) for part in (slice(first), slice(first, None))]
    # all NaN agrees with all NaN and proves nothing
    return bool(whole[0].isfinite().any()) and torch.allclose(whole, torch.cat(parts, dim=1), rtol=RTOL, atol=ATOL, equal_nan=True)


def _agrees_bare(loss: TokenLoss, first: int, second: int) -> bool:
    """The same without inputs, where a loss may take another branch; one that needs its inputs raises, and that says nothing."""
    try:
        return _agrees(loss, first, second, bare=True)
    except Exception:
        return True


def _has_weights(loss: TokenLoss) -> bool:
    """Whether the loss depends on a trainable tensor beside the statistics (of a module, say), whose gradient a forward would lose."""
    return loss(*_plausible(sum(SPLITS[0]))).loss.requires_grad


def _on_cpu(loss: TokenLoss) -> TokenLoss:
    """The loss with its 0-d tensors on the CPU and a vocabulary, should it want one."""

    def moved(given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value.detach().to("cpu") if isinstance(value, Tensor) else value for name, value in given.items()}

    return replace(loss, params=moved(loss.params), regularisers=moved(loss.regularisers)).for_vocabulary(VOCABULARY)


def check_once(loss: TokenLoss) -> None:
    """One call on plausible tokens, so that a parameter out of range is an error where it is given and not in the first step."""
    with torch.inference_mode(False), torch.no_grad():
        _on_cpu(loss)(*_plausible(3))


def is_token_local(loss: TokenLoss) -> bool:
    """True when every try agrees; some milliseconds.  A loss that raises on made-up tokens is taken as not token-local, with a warning.

    With all inputs given, and with none where the loss can do without; False too for a loss with trainable tensors of its own.  It is a test, not a proof: a loss that looks at its neighbours
    only from 34 tokens on, or only for values that were not tried, passes.  TermsError, a ValueError, when what comes back is not
    TokenTerms of one value per token.
    """
    tried = _on_cpu(loss)
    # fork_rng: a loss that draws random numbers must not move the training run's generator
    with torch.inference_mode(False), torch.enable_grad(), saving_as_it_is(), torch.random.fork_rng(devices=[]):
        try:
            local = all(_agrees(tried, first, second) and _agrees_bare(tried, first, second) for first, second in SPLITS)
            return local and not _has_weights(tried)
        except _Raised as raised:
            error = raised.__cause__
    warnings.warn(
        f"loss '{loss.name}' raised {type(error).__name__} on made-up tokens ({error}): taken as not token-local, "
        "its gradients are formed in two passes",
        stacklevel=3,
    )
    return False


def own_metrics(loss: TokenLoss, given: frozenset[str]) -> tuple[str, ...]:
    """Names of the metrics that the function of `loss` reports when the inputs called `given` are there; tried on made-up tokens.

    ValueError where the loss needs an input that is not given.  Kept: with the loss, or for all bindings of a function that has a twin.
    """
    defaults = {p.name: p.default for p in inspect.signature(loss.fn).parameters.values() if p.default is not p.empty}
    # reading a tensor would wait for the GPU: a number of ours stands in, as a tensor, since range checks look at numbers
    numbers = {name: _stand_in(value, defaults.get(name)) for name, value in loss.params.items()}
    if loss.twin is None:
        fn, names = loss.tried.get(given, (None, ()))
        if fn is not loss.fn:
            names = _try_metrics(loss.fn, given, tuple(numbers.items()))
            loss.tried[given] = loss.fn, names
        return names
    return _kept_metrics(loss.fn, given, tuple(name for name, value in loss.params.items() if isinstance(value, Tensor)),
                         tuple((name, value) for name, value in numbers.items() if not isinstance(value, Tensor)))  # fmt: skip


def _stand_in(value: float | str | Tensor, default: object) -> float | str | Tensor:
    if not isinstance(value, Tensor):
        return value
    number = default if isinstance(default, (int, float)) else 1.0
    return value.detach() if value.device.type == "cpu" else torch.tensor(float(number), dtype=value.dtype, device="cpu")


def _try_metrics(fn: LossFunction, given: frozenset[str], params: tuple[tuple[str, float | str | Tensor], ...]) -> tuple[str, ...]:
    stats, inputs = _plausible(3)
    plain = {name: x for name, x in inputs.tensors().items() if name in given | {"coefficient"}}
    extra = inputs.extra if any(name.startswith("extra.") for name in given) else {}
    loss = TokenLoss(fn, dict(params)).for_vocabulary(VOCABULARY)
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        return tuple(loss(stats, TokenInputs(**plain, extra=extra)).metrics)


@lru_cache(maxsize=256)
def _kept_metrics(fn: LossFunction, given: frozenset[str], tensors: tuple[str, ...], numbers: tuple[tuple[str, float | str], ...]) -> tuple[str, ...]:
    return _try_metrics(fn, given, (*((name, torch.tensor(1.0, device="cpu")) for name in tensors), *numbers))


def metric_names(loss: TokenLoss, given: frozenset[str] = frozenset()) -> list[str]:
    """Names of what a step with `loss` reports (hooks/report.py) when it is given the inputs `given` (of TokenInputs, "extra.<name>") beside a coefficient, "lm loss" included.

    ValueError where the loss needs more: supervised training has no advantage to give, say.
    """
    own = own_metrics(loss, given)
    return ["lm loss", *(name for name in BASE_METRICS if name != "loss"), *CLL_METRICS, *PROBABILITY_METRICS, *own, *loss.regularisers]
