"""Released code that is no package: numbers that its lines gave once, in frozen.json with the file, the commit and the settings of each.

Inputs are in the file too: 4 sequences of up to 4 places, 7 columns (25 for the one that looks at the 20 largest).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from megatron_plugin import TokenInputs, TokenTerms, bind, mu_schedule, token_stats
from megatron_plugin.losses.advantages import augmented_advantages
from megatron_plugin.losses.idft import idft
from megatron_plugin.parallel.normaliser import Source
from megatron_plugin.schedules.mu import MU_PRESETS
from megatron_plugin.schedules.ramp import ramp_schedule
from tests.parity import ours
from tests.parity.case import Case
from tests.parity.cell import Cell
from tests.parity.ours import Answer, gradient, leaf, mine

MU = 0.3
PAIRS = (slice(0, 2), slice(2, 4))
FREE = {"clip_low": 1.0, "clip_high": float("inf"), "dual_clip": float("inf")}


@cache
def frozen() -> dict:
    return json.loads((Path(__file__).parent / "frozen.json").read_text())


def made(name: str, dtype: torch.dtype) -> Case:
    """The inputs of a vector, whichever it is; wide for the one of 25 columns; some vectors lower a label's logit, and have rewards of their own."""
    given, wide, own = frozen()["inputs"], "wide_" if name == "eaft_top20" else "", frozen()["vectors"][name]
    logits = torch.tensor(given[f"{wide}logits"], dtype=torch.float64)
    for row, place, by in own.get("lowered", ()):
        logits[row, place, given["labels"][row][place]] -= by
    logits, rows = logits.to(dtype), len(logits)
    mask = torch.ones(logits.shape[:2], dtype=torch.bool) if wide else torch.tensor(given["mask"]).bool()
    old = torch.tensor(given["old_logp"], dtype=dtype)[:rows]
    reward = torch.tensor(own["rewards"], dtype=dtype) if "rewards" in own else None
    return Case(name, reward=reward, logits=logits, labels=torch.tensor(given[f"{wide}labels"]), mask=mask, temperature=1.0, old_logp=old, rollout_logp=old,
                ref_logp=old, advantage=torch.tensor(given["advantage"], dtype=dtype)[:rows], expert=torch.tensor(given["expert"])[:rows])  # fmt: skip


def kept(case: Case) -> Answer:
    """What the vector holds."""
    vector = frozen()["vectors"][case.kind]
    grad = vector.get("grad")
    return Answer(torch.tensor(vector["value"], dtype=torch.float64), None if grad is None else torch.tensor(grad, dtype=torch.float64))


def value_only(side: Callable[[Case], Answer]) -> Callable[[Case], Answer]:
    return lambda case: Answer(side(case).value)


def idft_through_p(stats, inputs, *, beta: float = 1.0, gamma_max: float = 2.0, ramp: float = 1.0) -> TokenTerms:
    """idft whose gamma is held fixed and whose p is not: -p^gamma log p, differentiated through both p."""
    gamma = idft(stats, inputs, beta=beta, gamma_max=gamma_max, ramp=ramp).metrics["gamma"]
    return TokenTerms(-(gamma * stats.logp).exp() * stats.logp)


def top20(case: Case) -> Answer:
    """eaft on the entropy of the 20 largest columns, renormalised, over 3.0: that of a vocabulary of e^3."""
    logits = leaf(case)
    largest = case.logits.topk(20, dim=-1).indices
    others = torch.ones_like(case.logits, dtype=torch.bool).scatter(-1, largest, False)
    entropy = token_stats(case.logits.masked_fill(others, -math.inf), largest[..., 0]).entropy
    terms = bind("eaft", vocab_size=math.exp(3.0))(token_stats(logits, case.labels)._replace(entropy=entropy), TokenInputs())
    return gradient(terms.loss.mean(), logits)


def luffy(case: Case, *, gamma: float, clips: dict[str, float], per_place: bool) -> Answer:
    """Demonstrations by `luffy`, answers by `grpo`, over all tokens or over the places of a sequence."""
    demo, own = (ours.with_mask(case, case.mask & chosen[:, None]) for chosen in (case.expert, ~case.expert))
    divided_by = case.mask.shape[1] if per_place else case.mask.sum()
    parts = ((ours.loss(demo, "luffy", gamma=gamma), demo), (ours.loss(own, "grpo", **clips), own))
    shares = [(part, float(where.mask.sum() / divided_by)) for part, where in parts]
    return Answer(sum(part.value * share for part, share in shares), sum(part.grad * share for part, share in shares))


def chord(case: Case, preset: str, **how) -> Answer:
    shares = {"source": Source(share=1 - MU), "expert": Source(share=MU)}
    return ours.loss(case, "chord", preset=preset, **shares, **ours.CLIPS, **how)


def by_samples(case: Case, preset: str) -> Answer:
    """Each micro-batch a step of its own, with shares by its samples of either kind: half the demonstrations and half the answers here."""
    assert [int(case.expert[part].sum()) for part in PAIRS] == [1, 1]
    return chord(case, preset, micro=PAIRS, local=(0.5, 0.5))


def mu(case: Case) -> Answer:
    shipped = [mu_schedule(step, **MU_PRESETS["shipped"]) for step in (0, 1, 100, 199, 200, 201, 400, 599, 600, 700)]
    decayed = [mu_schedule(step, **MU_PRESETS["mu"]) for step in (0, 50, 150, 199, 200)]
    return Answer(torch.tensor(shipped + decayed, dtype=torch.float64))


def srft(case: Case, preset: str, **options: float) -> Answer:
    return ours.loss(case, "srft", preset=preset, expert=ours.TOKEN, dual_clip=float("inf"), **options)


def split_advantages(case: Case) -> Answer:
    rewards = frozen()["inputs"]["rewards"]
    own, demos = augmented_advantages(rewards["answers"], rewards["demos"], over_answers=True)
    return Answer(torch.stack([torch.cat(pair) for pair in zip(own, demos, strict=True)]))


def ramp(case: Case) -> Answer:
    return Answer(torch.tensor([ramp_schedule(step, 30, warmup_ratio=0.2, transition_ratio=0.1) for step in range(30)], dtype=torch.float64))


def cell(name: str, theirs: str, call: str, side: Callable[[Case], Answer], peer: Callable[[Case], Answer] = kept, **more) -> Cell:
    return Cell(theirs, call, peer, side, make=made, inputs=(name,), said="frozen", **more)


def through_p(name: str, said: str, **params: float) -> Cell:
    call = ", ".join(["idft", *(f"{k}={v:g}" for k, v in params.items())])
    return cell(name, f"IDFT {said}", call, mine("idft", **params), why="gamma is held fixed, p is not: -p^gamma (1 + gamma log p) in the gradient",
                switched=mine(idft_through_p, **params), how="a loss of two lines on idft's gamma")  # fmt: skip


CELLS = [
    cell("dft", "DFT fsdp_dft_trainer._compute_loss_and_backward", "dft, token mean", mine("dft")),
    cell("dft_two_micro_batches", "DFT fsdp_dft_trainer.training_step, two micro-batches", "dft, counts of the step", mine("dft", micro=PAIRS),
         why="mean of the token means of micro-batches", switched=mine("dft", micro=PAIRS, local=(0.5, 0.5)), how="count_step of each micro-batch"),
    through_p("idft", "fsdp_polylog_trainer._compute_loss_and_backward"),
    through_p("idft_ramp_0.4", "fsdp_polylog_trainer, lambda_t=0.4", ramp=0.4),
    through_p("idft_beta_0.5_gamma_max_1", "fsdp_polylog_trainer, polylog_beta=0.5, gamma_max=1", beta=0.5, gamma_max=1.0),
    through_p("idft_beta_0.3", "fsdp_polylog_trainer, polylog_beta=0.3, gamma at its lower bound", beta=0.3),
    cell("idft_lambda", "IDFT fsdp_polylog_trainer, lambda_t", "ramp_schedule(step, 30, warmup_ratio=0.2, transition_ratio=0.1)", ramp),
    cell("adaptive_polylog", "IDFT losses.adaptive_polylog_loss", "idft", value_only(mine("idft")), value_only(kept),
         note="values only: theirs detaches the whole loss, so that its gradient is 0"),
    cell("eaft", "IDFT losses.eaft_loss", "eaft", mine("eaft")),
    cell("indomain_cot", "IDFT losses.indomain_cot_loss", "cll_sigmoid", mine("cll_sigmoid")),
    cell("eaft_top20", "LLaMA-Factory _eaft_cross_entropy", "eaft", mine("eaft"), why="entropy of the 20 largest columns over 3.0, not exact over log V",
         switched=top20, how="eaft, vocab_size=e^3, on token_stats of the 20 largest columns"),
    cell("chord_phi", "Trinity-RFT SFTPhiLossFn", "chord_phi, token mean", mine("chord_phi")),
    cell("chord_trinity", "Trinity-RFT MIXCHORDPolicyLossFn", 'chord, preset="trinity"', partial(chord, preset="trinity"), preset="trinity"),
    cell("chord_mu", "Trinity-RFT MIXCHORDPolicyLossFn, enable_phi_function=False", 'chord, preset="mu"', partial(chord, preset="mu"), preset="mu"),
    cell("chord_two_micro_batches", "Trinity-RFT MIXCHORDPolicyLossFn, two micro-batches", 'chord, preset="trinity", counts of the step',
         partial(chord, preset="trinity", micro=PAIRS), why="token means of micro-batches, averaged by samples",
         switched=partial(by_samples, preset="trinity"), how="count_step of each micro-batch, shares by samples"),
    cell("mu_schedule", "Trinity-RFT mu_schedule_function", "mu_schedule(step, **MU_PRESETS[...]), shipped and mu", mu),
    cell("luffy", "LUFFY compute_token_on_off_policy_loss, p_div_p_0.1, as in train.sh", "luffy on demonstrations, grpo without clips on answers",
         partial(luffy, gamma=0.1, clips=FREE, per_place=True)),
    cell("luffy_clip_mean", "LUFFY compute_token_on_off_policy_loss, p_div_p_0.5, clip, token mean", "luffy, gamma=0.5 on demonstrations, grpo",
         partial(luffy, gamma=0.5, clips={"dual_clip": float("inf")}, per_place=False)),
    cell("luffy_advantages", "LUFFY compute_grpo_outcome_advantage_split", "augmented_advantages(over_answers=True)", split_advantages),
    cell("srft_code", "SRFT mix_core_alg, mix_actor, as noted by readers", 'srft, preset="code", dual_clip=inf', partial(srft, preset="code"), preset="code"),
    cell("srft_paper", "SRFT arXiv 2506.19767, eq. 8 to 13, as noted by readers", 'srft, preset="paper"', partial(srft, preset="paper"),
         preset="paper"),
    cell("srft_paper_rare", "SRFT arXiv 2506.19767, the same, rewards against the advantage's sign, a wrong token of e^-8", 'srft, preset="paper"',
         partial(srft, preset="paper"), preset="paper"),
    cell("srft_paper_floor", "SRFT arXiv 2506.19767, the same, a wrong token of e^-13", 'srft, preset="paper"', partial(srft, preset="paper"),
         why="+log p of a wrong token has no lower bound; ours ends at wrong_floor, e^-10", switched=partial(srft, preset="paper", wrong_floor=-math.inf),
         how="wrong_floor=-inf"),
]  # fmt: skip
NOT_COMPARED = ("reverse_polylog_loss of IDFT's repository", "ASFT of LLaMA-Factory",
                "square_root, pow and logp reshapes of LUFFY: ours has no such loss; and, since no vector was made of them, dft_loss of IDFT's repository",
                "_dft_cross_entropy of LLaMA-Factory", "the branch of DFT's trainer for sequence parallelism (Ulysses)",
                "the clamp of p at 1e-10 in IDFT's logarithm, which none of these tokens reaches (gamma is 2 there: it would be 1e-20 of the loss)")
VERSION = "no package"
HOW = "vectors of tests/parity/frozen.json, where source, commit and settings of each are; SRFT's are this project's own transcription of " \
      "readers' notes, since its repository was not readable, and so no parity with its code; five rows of Trinity-RFT are also compared live above"  # fmt: skip
