"""Losses as a user writes them, good and bad, for bind by dotted path and for the probe."""

import torch

from megatron_plugin.losses.contract import TokenTerms


def tempered(stats, inputs, *, tau, floor=0.0):
    weight_T = (stats.logp.detach() / tau).exp().clamp(min=floor)
    return TokenTerms(loss=-weight_T * stats.logp, weight=weight_T)


# token-local

def kl_to_reference(stats, inputs, *, beta=0.1):
    log_ratio_T = inputs.ref_logp - stats.logp
    return TokenTerms(loss=-stats.logp + beta * (log_ratio_T.exp() - log_ratio_T - 1))


def own_field(stats, inputs):
    return TokenTerms(loss=-inputs.extra["quality"] * stats.logp)


def masked_by_kind(stats, inputs):
    return TokenTerms(loss=torch.where(inputs.expert, -stats.logp, -inputs.advantage * stats.logp.exp()))


def entropy_and_lse(stats, inputs):
    return TokenTerms(loss=-stats.logp - 0.1 * stats.entropy.sqrt() + 1e-3 * stats.lse.abs())


def default_branch(stats, inputs):
    advantage_T = 1.0 if inputs.advantage is None else inputs.advantage
    return TokenTerms(loss=-advantage_T * stats.logp)


# not token-local

def batch_normalised(stats, inputs):
    weight_T = stats.logp.detach().exp()
    return TokenTerms(loss=-weight_T / weight_T.mean() * stats.logp)


def batch_normalised_weight_only(stats, inputs):
    """The loss itself is local: the log would depend on the chunking."""
    return TokenTerms(loss=-stats.logp, weight=torch.softmax(stats.logp.detach(), 0))


def cumulated(stats, inputs):
    return TokenTerms(loss=-stats.logp.detach().cumsum(0).exp() * stats.logp)


def quantile_mask(stats, inputs):
    return TokenTerms(loss=torch.where(stats.entropy >= stats.entropy.detach().quantile(0.8), -stats.logp, 0 * stats.logp))


def positional(stats, inputs):
    return TokenTerms(loss=-stats.logp / (1 + torch.arange(len(stats.logp))))


def divided_by_count(stats, inputs):
    return TokenTerms(loss=-stats.logp / len(stats.logp))


def gradient_only(stats, inputs):
    """The values are those of SFT, the neighbours come in through the backward alone."""
    mean = stats.logp.mean()
    return TokenTerms(loss=-stats.logp + 0.1 * (mean - mean.detach()))


def entropy_gradient_only(stats, inputs):
    total = stats.entropy.sum()
    return TokenTerms(loss=-stats.logp + 0.1 * (total - total.detach()))


def sequence_ratio(stats, inputs):
    """GSPO: the mean log-ratio of all tokens with the same sequence number."""
    number_T = inputs.extra["sequence"].long()
    total = torch.zeros(4).index_add(0, number_T, stats.logp - inputs.old_logp)
    count = torch.zeros(4).index_add(0, number_T, torch.ones_like(stats.logp))
    return TokenTerms(loss=-inputs.advantage * (total / count)[number_T].exp())


def only_without_inputs(stats, inputs):
    weight_T = torch.ones_like(stats.logp) / len(stats.logp) if inputs.coefficient is None else inputs.coefficient
    return TokenTerms(loss=-weight_T * stats.logp)


def coefficient_mean(stats, inputs):
    return TokenTerms(loss=-stats.logp / inputs.coefficient.mean())


def noisy(stats, inputs):
    return TokenTerms(loss=-stats.logp * (1 + torch.rand_like(stats.logp)))


def always_nan(stats, inputs):
    return TokenTerms(loss=stats.logp * float("nan"))


LOCAL = (kl_to_reference, own_field, masked_by_kind, entropy_and_lse, default_branch)
NOT_LOCAL = (
    batch_normalised, batch_normalised_weight_only, cumulated, quantile_mask, positional, divided_by_count, gradient_only,
    entropy_gradient_only, sequence_ratio, only_without_inputs, coefficient_mean, noisy, always_nan,
)


# cannot be probed

def raises(stats, inputs):
    raise KeyError("cu_seqlens")


def pairs(stats, inputs):
    return TokenTerms(loss=(-stats.logp).view(-1, 2).mean(1).repeat_interleave(2))


class _BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward yet")


def broken_backward(stats, inputs):
    return TokenTerms(loss=_BrokenBackward.apply(-stats.logp))


# no loss

def scalar(stats, inputs):
    return TokenTerms(loss=-stats.logp.mean())


def bare_tensor(stats, inputs):
    return -stats.logp


def all_detached(stats, inputs):
    """As in the released adaptive_polylog_loss: everything behind the weight is detached too."""
    return TokenTerms(loss=(-stats.logp.exp() * stats.logp).detach())


def scalar_metric(stats, inputs):
    return TokenTerms(loss=-stats.logp, metrics={"accuracy": (stats.logp > -1).float().mean()})


def taken_metric(stats, inputs):
    return TokenTerms(loss=-stats.logp, metrics={"nll": -stats.logp.detach()})


def labels_first(labels):
    return labels


def with_own_z_loss(stats, inputs, *, z_loss=1.0):
    return TokenTerms(loss=-stats.logp + z_loss * stats.lse**2)


class Focal:
    """A callable object."""

    def __init__(self, power):
        self.power = power

    def __call__(self, stats, inputs):
        weight_T = (-torch.expm1(stats.logp.detach())) ** self.power
        return TokenTerms(loss=-weight_T * stats.logp, weight=weight_T)


focal = Focal(2)


def becomes_nan(stats, inputs):
    """NaN on improbable tokens: all those of an untrained model."""
    return TokenTerms(loss=torch.where(stats.logp < -5, torch.nan, -stats.logp))


def nan_gradient(stats, inputs):
    """A finite value whose derivative is NaN: sqrt has none at 0."""
    return TokenTerms(loss=-stats.logp + 0 * (0 * stats.logp.abs()).sqrt())


def over_batch_mean(stats, inputs):
    """Each weight relative to the mean weight of the live tokens: not token-local."""
    weight_T = stats.logp.detach().exp()
    mean = (weight_T * (inputs.coefficient != 0)).sum() / (inputs.coefficient != 0).sum()
    return TokenTerms(loss=-weight_T / mean * stats.logp, weight=weight_T / mean)
