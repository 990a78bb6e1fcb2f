"""The public ops.  logits.py takes logits, hidden.py hidden states and the output head; both give statistics or a weighted loss."""

from megatron_plugin.ops.hidden import linear_token_loss, linear_token_stats
from megatron_plugin.ops.logits import token_loss, token_stats
from megatron_plugin.ops.options import Head, Plan, TensorParallel

__all__ = ["Head", "Plan", "TensorParallel", "linear_token_loss", "linear_token_stats", "token_loss", "token_stats"]
