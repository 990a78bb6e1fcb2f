"""Our side, through the public names: the op on logits, the loss by its name, the normaliser's coefficients, megatron-core's one division."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_plugin import TokenInputs, TokenLoss, bind, token_loss, token_stats
from megatron_plugin.losses.advantages import sequence_weight
from megatron_plugin.parallel.normaliser import Source, StepMask, coefficients, count_step, divisor, sequence_tokens
from tests.parity.case import NEVER_SAMPLED, Case, S

ALL, HALVES = slice(None), (slice(0, 3), slice(3, 6))
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
"""DAPO's; every peer is told the same."""
TOKEN, SEQUENCE = Source(), Source(denominator="sequence")
CONSTANT, SUMS = Source(denominator="constant", constant=S), Source(denominator="constant", constant=1)


class Answer(NamedTuple):
    """What one side says: a value (any shape), and the gradient of its sum by the logits where there is one."""

    value: Tensor
    grad: Tensor | None = None


def gradient(value: Tensor, logits: Tensor) -> Answer:
    """`value` and the derivative of its sum by the leaf `logits`."""
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return Answer(value.detach(), grad)


def leaf(case: Case) -> Tensor:
    return case.logits.detach().clone().requires_grad_()


def stats(case: Case, column: str, weight: Tensor | None = None) -> Answer:
    """One of token_stats's columns on every place, masked ones too: [b, s]; the gradient is that of its weighted sum."""
    logits = leaf(case)
    value = getattr(token_stats(logits, case.labels, temperature=case.temperature), column)
    (grad,) = torch.autograd.grad((value if weight is None else weight * value).sum(), logits)
    return Answer(value.detach(), grad)


def inputs(case: Case, coefficient: Tensor, **given: Tensor | dict[str, Tensor]) -> TokenInputs:
    """Everything a loss may ask for, [b, s] each; `given` replaces some of it (None: leaves it out)."""
    found = {"advantage": case.per_token(case.advantage), "old_logp": case.old_logp, "rollout_logp": case.rollout_logp, "ref_logp": case.ref_logp}
    return TokenInputs(coefficient=coefficient, **(found | given))


def extras(case: Case, loss: str) -> dict[str, Tensor]:
    """What only this loss asks for: with any of them a kernel's twin of the loss is not used."""
    if loss == "gspo":
        return {"sequence": torch.arange(len(case.labels))[:, None].expand(case.labels.shape)}
    reward = (case.advantage > 0).to(case.dtype) if case.reward is None else case.reward
    return {"reward": case.per_token(reward)} if loss == "srft" else {}


def loss(
    case: Case,
    name: str | Callable | TokenLoss,
    *,
    source: Source | None = None,
    expert: Source | None = None,
    micro: Sequence[slice] = (ALL,),
    local: Sequence[float] | None = None,
    weight: Tensor | None = None,
    given: dict[str, Tensor] | None = None,
    **params: float | str,
) -> Answer:
    """The step's loss and its gradient by all the logits.

    source, expert: how rollouts and demonstrations enter (token mean by default); `expert` given: the case's demonstrations count as such.
    micro: rows of each micro-batch; counts are of the whole step, as in training.  local: the opposite, for peers that count so: every
    micro-batch is a step of its own and they are added up with these shares.  weight: a factor on each token's coefficient, [b, s].
    """
    logits = leaf(case)
    mixed = {} if expert is None else {"expert": case.per_token(case.expert)}
    places = {"source": source or Source(), "expert": expert or Source(), "weight": weight, "given": (given or {}) | mixed}
    bound = bind(name, **params)
    parts = [[part] for part in micro] if local is not None else [list(micro)]
    total = sum(share * _step(case, logits, bound, part, **places) for share, part in zip(local or [1.0], parts, strict=True))
    return gradient(total, logits)


def _step(case: Case, logits: Tensor, bound: TokenLoss, micro, *, source: Source, expert: Source, weight, given) -> Tensor:
    lengths = sequence_tokens(case.mask.float())
    masks = [StepMask(case.mask[part].float(), given["expert"][part] if "expert" in given else None, lengths[part]) for part in micro]
    counts = count_step(masks)
    total = 0.0
    for part, mask in zip(micro, masks, strict=True):
        rows = case.rows(part)
        coefficient = coefficients(mask, counts, expert=expert, rollout=source)
        if weight is not None:
            coefficient = coefficient * weight[part].to(coefficient.dtype)
        labels = rows.labels.masked_fill(~rows.mask, NEVER_SAMPLED)
        some = {name: None if x is None else x[part] for name, x in given.items()}
        known = inputs(rows, coefficient, extra=extras(rows, bound.name), **some)
        total = total + token_loss(logits[part], labels, bound, inputs=known, temperature=case.temperature).loss_sum
    return total / divisor(counts, expert=expert, rollout=source)


def mine(name: str | Callable = "grpo", source: Source = TOKEN, **options) -> Callable[[Case], Answer]:
    """`loss` as the side of a cell; grpo with CLIPS."""
    return lambda case: loss(case, name, source=source, **(CLIPS if name == "grpo" else {}) | options)


def term_alone(source: Source = TOKEN, **option: float | str) -> Callable[[Case], Answer]:
    """What an option adds to grpo: grpo with all advantages 0."""
    return lambda case: loss(case, "grpo", source=source, given={"advantage": torch.zeros_like(case.old_logp)}, **option)


def with_mask(case: Case, mask: Tensor) -> Case:
    return replace(case, mask=mask)


def sequence_weights(case: Case, mode: str, bound: float, new: Tensor | None = None, old: Tensor | None = None) -> Tensor:
    """sequence_weight of each row on all its places, [b, s] fp64.  new, old: its two log-probabilities, by default old_logp and rollout_logp."""
    new, old = case.old_logp if new is None else new, case.rollout_logp if old is None else old
    found = [sequence_weight(n[m], o[m], mode=mode, bound=bound, advantage=float(a)) if m.any() else 1.0
             for n, o, m, a in zip(new, old, case.mask, case.advantage, strict=True)]  # fmt: skip
    return case.per_token(torch.tensor(found, dtype=torch.float64))


def by_sequence(mode: str, bound: float, **options) -> Callable[[Case], Answer]:
    """grpo whose answers are weighed as wholes."""
    return lambda case: mine(weight=sequence_weights(case, mode, bound), **options)(case)


def live_over_all(source: Source, **options) -> Callable[[Case], Answer]:
    """Sequences without a token counted too, as some peers do: every coefficient times live / all."""
    return lambda case: mine(source=source, weight=case.mask.any(1).double().mean().expand(case.labels.shape), **options)(case)
