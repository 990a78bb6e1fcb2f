"""Inputs with the token probabilities of a half-trained language model, and the truth every contender is compared with.

T tokens, H hidden, V vocabulary.  Random logits would give every token p = 1/V: no row confident, every weight alike, and the label's
column never in doubt.  Here 60 % of the tokens are nearly sure, 25 % anything, 15 % surprising (mean NLL about 0.9 nats), and the rest of
a row follows a Zipf prior.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from megatron_plugin.bench.shape import Shape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
IGNORE = -100
ENTROPY = 0.2
"""Coefficient of the entropy bonus: so large that a contender which forgets the entropy's gradient fails the comparison."""
OBJECTIVES = ("nll", "dft", "dft+entropy", "chord_phi+entropy")
CHUNK = 512
SAMPLED = 256
"""Rows (and, hidden-in, vocabulary entries) whose gradient is compared element by element; the [T] outputs are compared everywhere."""


def coefficients(objective: str, logp_T: Tensor, live_T: Tensor) -> tuple[Tensor, Tensor]:
    """(dF/dlogp, dF/dH) [T] of F = -weight logp - ENTROPY H, summed over live tokens, the weight detached."""
    p_T = logp_T.exp()
    weight_T = {"nll": torch.ones_like(p_T), "dft": p_T, "chord_phi": p_T * -torch.expm1(logp_T)}[objective.split("+")[0]]
    b = -ENTROPY if objective.endswith("+entropy") else 0.0
    return torch.where(live_T, -weight_T, 0.0), torch.where(live_T, b, torch.zeros_like(p_T))


def objective_sum(objective: str, logp_T: Tensor, entropy_T: Tensor | None, live_T: Tensor) -> Tensor:
    """The loss that contenders without token weights of their own put on top of their log-probabilities."""
    a_T, b_T = coefficients(objective, logp_T.detach(), live_T)
    total = (a_T * torch.where(live_T, logp_T, 0.0)).sum()
    return total if entropy_T is None else total + (b_T * entropy_T).sum()


def _row_gradient(z: Tensor, labels: Tensor, a: Tensor, b: Tensor, logp: Tensor, entropy: Tensor, lse: Tensor) -> Tensor:
    """dF/dz of whole rows from their statistics, in the precision of z (already divided by the temperature)."""
    log_p = z - lse[:, None]
    dz = -log_p.exp() * (a[:, None] + b[:, None] * (log_p + entropy[:, None]))
    rows = torch.arange(len(z), device=z.device)
    dz[rows, labels] += a
    return dz


def _labels_and_odds(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(labels with masked rows, labels without, log p/(1-p) each label is to have)."""
    uniform, kind, rank, mask = torch.rand(4, shape.T, dtype=torch.float64, generator=generator, device=generator.device).clamp(1e-6, 1 - 1e-6)
    p_T = torch.where(kind < 0.6, uniform ** (1 / 30), torch.where(kind < 0.85, uniform, uniform**4)).clamp(1e-6, 1 - 1e-6)
    ids_T = torch.exp(rank * math.log(shape.V)).long().clamp(1, shape.V) - 1
    return torch.where(mask < shape.masked, IGNORE, ids_T), ids_T, torch.log(p_T) - torch.log1p(-p_T)


def _prior(V: int, device: torch.device) -> Tensor:
    return -torch.log(torch.arange(1, V + 1, device=device, dtype=torch.float32))


def _sampled(count: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(count, SAMPLED), device=device).round().long().unique()


@dataclass
class _Case:
    shape: Shape
    labels: Tensor
    """[T] int64, IGNORE in masked rows."""
    device: torch.device

    @property
    def live(self) -> Tensor:
        return self.labels != IGNORE

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.shape.dtype]

    def expected_loss(self, objective: str) -> Tensor:
        a_T, b_T = coefficients(objective, self.truth["logp"], self.live)
        return (a_T * self.truth["logp"]).sum() + (b_T * self.truth["entropy"]).sum()


@dataclass
class LogitsCase(_Case):
    original: Tensor
    """[T, V]: never handed to a contender."""
    logits: Tensor
    """[T, V]: what contenders read and may overwrite."""

    def restore(self) -> None:
        """Undo what a contender wrote; outside the timed region."""
        self.logits.copy_(self.original)

    def output_bytes(self) -> list[int]:
        """Sizes of the gradients a contender returns."""
        return [self.original.numel() * self.original.element_size()]

    def leaf(self) -> Tensor:
        return self.logits.detach().requires_grad_()

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """[T] fp64 statistics of every row."""
        parts = [self._stats(rows) for rows in torch.arange(self.shape.T, device=self.device).split(CHUNK)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _stats(self, rows: Tensor) -> dict[str, Tensor]:
        z = self.original[rows].double() / self.shape.temperature
        live = self.live[rows]
        log_p = z.log_softmax(-1)
        stats = {
            "logp": log_p.gather(1, self.labels[rows].clamp(min=0)[:, None])[:, 0],
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "lse": z.logsumexp(-1),
        }
        return {name: torch.where(live, x, 0.0) for name, x in stats.items()}

    def expected(self, name: str) -> Tensor:
        """The truth for an output called `name`: logp, entropy, lse, loss:<objective> or dlogits:<objective> (sampled rows)."""
        kind, _, objective = name.partition(":")
        if kind == "loss":
            return self.expected_loss(objective)
        if kind != "dlogits":
            return self.truth[kind]
        rows = _sampled(self.shape.T, self.device)
        a, b = (x[rows] for x in coefficients(objective, self.truth["logp"], self.live))
        z = self.original[rows].double() / self.shape.temperature
        stats = (self.truth[key][rows] for key in ("logp", "entropy", "lse"))
        return _row_gradient(z, self.labels[rows].clamp(min=0), a, b, *stats) / self.shape.temperature

    def pick(self, name: str, output: Tensor) -> Tensor:
        """The part of an output that `expected` speaks of."""
        return output[_sampled(self.shape.T, self.device)] if name.startswith("dlogits") else output


def logits_case(shape: Shape, device: str) -> LogitsCase:
    """Logits = Zipf prior + noise, and the label's logit set so that its probability is the drawn one."""
    generator = torch.Generator(device).manual_seed(shape.seed)
    labels, ids, odds = _labels_and_odds(shape, generator)
    original = torch.empty(shape.T, shape.V, dtype=DTYPES[shape.dtype], device=device)
    prior = _prior(shape.V, original.device)
    for rows in torch.arange(shape.T, device=device).split(CHUNK):
        z = prior + torch.randn(len(rows), shape.V, generator=generator, device=device)
        z.scatter_(1, ids[rows, None], -torch.inf)
        z.scatter_(1, ids[rows, None], (z.logsumexp(1) + odds[rows])[:, None].float())
        original[rows] = (z * shape.temperature).to(original.dtype)
    return LogitsCase(shape, labels, original.device, original, original.clone())


@dataclass
class LinearCase(_Case):
    hidden: Tensor
    """[T, H]."""
    weight: Tensor
    """[V, H]."""
    _gradients: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def output_bytes(self) -> list[int]:
        """Sizes of the gradients a contender returns, dW in fp32 too."""
        return [self.hidden.numel() * self.hidden.element_size(), self.weight.numel() * self.weight.element_size(), self.weight.numel() * 4]

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """[T] statistics from fp32 logits (an fp64 product of this size takes minutes), the label's and sampled columns beside them."""
        assert torch.get_float32_matmul_precision() == "highest"
        weight, columns = self.weight.float(), _sampled(self.shape.V, self.device)
        parts = []
        for rows in torch.arange(self.shape.T, device=self.device).split(CHUNK):
            z = self.hidden[rows].float() @ weight.t() / self.shape.temperature
            lse = z.logsumexp(-1)
            log_p = z - lse[:, None]
            logp = log_p.gather(1, self.labels[rows].clamp(min=0)[:, None])[:, 0]
            parts.append({"logp": logp, "entropy": -(log_p.exp() * log_p).sum(-1), "lse": lse, "sampled": z[:, columns]})
        whole = {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}
        return {name: torch.where(self.live if x.dim() == 1 else self.live[:, None], x, 0.0) for name, x in whole.items()}

    def expected(self, name: str) -> Tensor:
        """The truth for loss:<objective>, dhidden:<objective> (sampled rows), dweight:<objective> (sampled vocabulary entries)."""
        kind, _, objective = name.partition(":")
        if kind == "loss":
            return self.expected_loss(objective)
        if kind not in ("dhidden", "dweight"):
            return self.truth[kind]
        if objective not in self._gradients:
            self._gradients[objective] = self._gradient(objective)
        return self._gradients[objective][kind == "dweight"]

    def _gradient(self, objective: str) -> tuple[Tensor, Tensor]:
        a, b = coefficients(objective, self.truth["logp"], self.live)
        stats = tuple(self.truth[key] for key in ("logp", "entropy", "lse"))
        rows, columns = _sampled(self.shape.T, self.device), _sampled(self.shape.V, self.device)
        z = (self.hidden[rows].float() @ self.weight.float().t()).double() / self.shape.temperature
        dz = _row_gradient(z, self.labels[rows].clamp(min=0), a[rows], b[rows], *(x[rows] for x in stats))
        dhidden = dz.float() @ self.weight.float() / self.shape.temperature
        logp, entropy, lse = stats
        log_p = self.truth["sampled"] - lse[:, None]
        dz = -log_p.exp() * (a[:, None] + b[:, None] * (log_p + entropy[:, None])) + a[:, None] * (self.labels[:, None] == columns)
        return dhidden, dz.float().t() @ self.hidden.float() / self.shape.temperature

    def pick(self, name: str, output: Tensor) -> Tensor:
        kind = name.partition(":")[0]
        count = {"dhidden": self.shape.T, "dweight": self.shape.V}.get(kind)
        return output if count is None else output[_sampled(count, self.device)]


def linear_case(shape: Shape, device: str) -> LinearCase:
    """Hidden states that point to their label as far as the drawn probability asks; a shared direction carries the Zipf prior."""
    generator = torch.Generator(device).manual_seed(shape.seed)
    labels, ids, odds = _labels_and_odds(shape, generator)
    prior = _prior(shape.V, labels.device)
    weight = torch.randn(shape.V, shape.H, generator=generator, device=device) / math.sqrt(shape.H) + prior[:, None] / shape.H
    hidden = 1 + torch.randn(shape.T, shape.H, generator=generator, device=device)
    towards = weight[ids]
    wanted_T = shape.temperature * (odds.float() + prior.logsumexp(0) + 0.5)  # 0.5: what unit noise adds to a log-sum-exp
    step_T = (wanted_T - (hidden * towards).sum(1)) / towards.square().sum(1)
    hidden = (hidden + step_T[:, None] * towards).to(DTYPES[shape.dtype])
    return LinearCase(shape, labels, labels.device, hidden, weight.to(DTYPES[shape.dtype]))
