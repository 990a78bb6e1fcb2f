"""The objectives inside the vocabulary kernel: each loss of megatron_plugin.losses once more as a @triton.jit function of scalars.

A twin takes one token's statistics, inputs and parameters and returns the loss and its derivatives:

    (logp, H, lse, coef, adv, old, roll, ref, expert, p0 .. p7)  ->  (loss, a, b, c, weight, *metrics)

    logp, H, lse    fp32, nats                                    a, b, c    dF/dlogp, dF/dH, dF/dlse, before the coefficient
    coef            1 when none was given                         weight     the factor in front of -logp; 1 for a loss without one
    adv             advantage; 1 when none was given              metrics    the loss's own, in the order its PyTorch form reports them
    old, roll, ref  log-probabilities; logp itself when not given
    expert          bool; false when not given
    p0 .. p7        the keyword parameters of the PyTorch form, in the order of its signature; unused ones are 0

Formulae, sources and units stand in the PyTorch form.  tests/kernels/test_weighting.py holds every twin to the PyTorch form's autograd.
Comparisons are written with `where`, because the GPU's min and max drop NaN.
"""

import triton
import triton.language as tl


@triton.jit
def one_minus_exp(x):
    """1 - e^x for x <= 0 to fp32 precision; 1 - exp(x) has no digit left at x = -1e-7."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040)))))))
    return tl.where(x > -0.5, -series, 1.0 - tl.exp(x))


@triton.jit
def power(x, exponent):
    """x^exponent for x >= 0, with 0^0 = 1."""
    return tl.where(exponent == 0.0, 1.0, tl.exp2(exponent * tl.log2(x)))


@triton.jit
def weighted_nll(weight, logp):
    """-w log p with 0 log 0 = 0, and its derivatives while w is held fixed."""
    loss = tl.where((weight == 0.0) & (logp == -float("inf")), 0.0, -weight * logp)
    return loss, -weight, 0.0, 0.0, weight


@triton.jit
def sft(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    return -logp, -1.0, 0.0, 0.0, 1.0


@triton.jit
def dft(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    return weighted_nll(tl.exp(logp), logp)


@triton.jit
def gce(logp, H, lse, coef, adv, old, roll, ref, expert, gamma, p1, p2, p3, p4, p5, p6, p7):
    return weighted_nll(tl.exp(gamma * logp), logp)


@triton.jit
def chord_phi(logp, H, lse, coef, adv, old, roll, ref, expert, p0, p1, p2, p3, p4, p5, p6, p7):
    phi = tl.exp(logp) * one_minus_exp(logp)
    loss, a, b, c, weight = weighted_nll(phi, logp)
    return loss, a, b, c, weight, phi


@triton.jit
def idft(logp, H, lse, coef, adv, old, roll, ref, expert, beta, gamma_min, gamma_max, ramp, p4, p5, p6, p7):
    raw = tl.exp(-(logp + H) / beta)
    raw = tl.where(raw < gamma_min, gamma_min, raw)
    gamma = 1.0 + ramp * (tl.where(raw > gamma_max, gamma_max, raw) - 1.0)
    loss, a, b, c, weight = weighted_nll(tl.exp(gamma * logp), logp)
    return loss, a, b, c, weight, gamma


@triton.jit
def cll_mask(logp, H, lse, coef, adv, old, roll, ref, expert, threshold, p1, p2, p3, p4, p5, p6, p7):
    return weighted_nll(tl.where(logp + H >= threshold, 1.0, 0.0), logp)


@triton.jit
def cll_sigmoid(logp, H, lse, coef, adv, old, roll, ref, expert, tau, temperature, w_min, w_max, p4, p5, p6, p7):
    surprise = -(logp + H - tau) / temperature
    return weighted_nll(w_min + (w_max - w_min) / (1.0 + tl.exp(-surprise)), logp)


@triton.jit
def eaft(logp, H, lse, coef, adv, old, roll, ref, expert, vocab_size, alpha, p2, p3, p4, p5, p6, p7):
    return weighted_nll(power(tl.where(H < 0.0, 0.0, H) / tl.log(vocab_size), alpha), logp)


@triton.jit
def srft_demo(logp, H, lse, coef, adv, old, roll, ref, expert, entropy_sign, max_weight, p2, p3, p4, p5, p6, p7):
    weight = 0.5 * tl.exp(entropy_sign * H)
    return weighted_nll(tl.where(weight > max_weight, max_weight, weight), logp)


@triton.jit
def luffy(logp, H, lse, coef, adv, old, roll, ref, expert, gamma, p1, p2, p3, p4, p5, p6, p7):
    distance = logp - tl.log(gamma)
    shaped = 1.0 / (1.0 + tl.exp(-distance))
    return -adv * shaped, -adv * shaped / (1.0 + tl.exp(distance)), 0.0, 0.0, 1.0


@triton.jit
def grpo(logp, H, lse, coef, adv, old, roll, ref, expert, clip_low, clip_high, dual_clip, p3, p4, p5, p6, p7):
    raw = logp - old
    bounded = tl.where(raw > 20.0, 20.0, tl.where(raw < -20.0, -20.0, raw))
    ratio = tl.exp(bounded)
    negative = adv < 0.0
    low = tl.where(negative, 1.0 - clip_low, 0.0)
    high = tl.where(negative, dual_clip, 1.0 + clip_high)
    kept = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    clipped = kept != ratio
    slope = tl.where(clipped | (bounded != raw), 0.0, ratio)
    return -adv * kept, -adv * slope, 0.0, 0.0, 1.0, ratio, clipped.to(tl.float32)
