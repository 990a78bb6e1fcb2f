"""The objectives, by name.  Yours: `LOSSES["mine"] = bind(my_loss)`, or pass the function or its dotted path to `bind`."""

# Modules, not functions: `from .dft import dft` would put the function in the place of the module megatron_plugin.losses.dft.
from megatron_plugin.losses import chord, dft, eaft, grpo, idft, luffy, sft, srft
from megatron_plugin.losses.contract import TokenLoss

__all__ = ["LOSSES"]

LOSSES: dict[str, TokenLoss] = {
    "sft": TokenLoss(sft.sft),
    "dft": TokenLoss(dft.dft),
    "sft_is": TokenLoss(dft.sft_is),
    "gce": TokenLoss(dft.gce),
    "chord_phi": TokenLoss(chord.chord_phi),
    "idft": TokenLoss(idft.idft),
    "eaft": TokenLoss(eaft.eaft),
    "srft_demo": TokenLoss(srft.srft_demo),
    "luffy": TokenLoss(luffy.luffy),
    "grpo": TokenLoss(grpo.grpo),
}
