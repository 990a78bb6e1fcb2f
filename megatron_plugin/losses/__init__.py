"""The objectives, by name.  Yours: `LOSSES["mine"] = bind(my_loss)`, or pass the function or its dotted path to `bind`."""

# Modules, not functions: `from .dft import dft` would put the function in the place of the module megatron_plugin.losses.dft.
from megatron_plugin.losses import chord, cispo, cll, dft, eaft, grpo, gspo, idft, luffy, sft, srft
from megatron_plugin.losses.contract import LossFunction, TokenLoss

__all__ = ["LOSSES"]


def _loss(fn: LossFunction, twin: str, *twin_params: str) -> TokenLoss:
    return TokenLoss(fn, twin=f"megatron_plugin.kernels.weighting.{twin}", twin_params=twin_params or None)


LOSSES: dict[str, TokenLoss] = {
    "sft": _loss(sft.sft, "sft"),
    "dft": _loss(dft.dft, "dft"),
    "sft_is": _loss(dft.sft_is, "dft"),
    "gce": _loss(dft.gce, "gce"),
    "chord_phi": _loss(chord.chord_phi, "chord_phi"),
    "idft": _loss(idft.idft, "idft"),
    "cll_mask": _loss(cll.cll_mask, "cll_mask"),
    "cll_sigmoid": _loss(cll.cll_sigmoid, "cll_sigmoid"),
    "eaft": _loss(eaft.eaft, "eaft"),
    "srft_demo": _loss(srft.srft_demo, "srft_demo"),
    "luffy": _loss(luffy.luffy, "luffy"),
    "grpo": _loss(grpo.grpo, "grpo", "clip_low", "clip_high", "dual_clip"),
    # two branches or more per token, or other tokens: formed in PyTorch on [T] vectors
    "cispo": TokenLoss(cispo.cispo),
    "gspo": TokenLoss(gspo.gspo, token_local=False),
    "chord": TokenLoss(chord.chord),
    "srft": TokenLoss(srft.srft),
}
