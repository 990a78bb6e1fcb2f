"""The public ops.  logits.py takes logits, hidden.py hidden states and the output head; both give statistics or a weighted loss."""

from megatron_plugin.ops.logits import token_loss, token_stats

__all__ = ["token_loss", "token_stats"]
