"""Greedy answers of the model being trained, and how many are right.

The prompts of a batch are continued together, one forward pass per token without a key-value cache: enough for the short answers of an
accuracy check during training; real rollouts are a rollout engine's work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_plugin.config import Config
from megatron_plugin.data import Conversation, ConversationEncoder, extract_answer, pad_id
from megatron_plugin.parallel.vocab import all_gather
from megatron_plugin.trainer.model import device

__all__ = ["accuracy"]

BATCH = 64


def accuracy(config: Config, chunks: list, tokenizer, conversations: Sequence[Conversation], vocab_size: int) -> tuple[float, int]:
    """(share of conversations whose final "#### n" the model reproduces greedily, how many were asked).  The same on every rank.

    Asked are those whose last message has such an answer and whose prompt leaves room in a row; data-parallel ranks share them.
    """
    encoder, room = ConversationEncoder(tokenizer), config.data.seq_length
    conversations = [c for c in conversations if c.messages[0].role != "assistant"]  # nothing is asked in those
    asked = [(encoder.prompt(c), extract_answer(c.messages[-1].content)) for c in conversations]
    asked = [(prompt, answer) for prompt, answer in asked if answer is not None and len(prompt) < room]
    # an untrained model never ends: twice the longest reference is as far as an answer is followed
    limit = 2 * max((len(tokenizer.encode(c.messages[-1].content)) for c in conversations), default=0)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    right = 0
    for start in range(0, len(asked), BATCH * ranks):
        batch = asked[start : start + BATCH * ranks]
        mine = batch[rank::ranks] or batch[:1]  # a rank without a prompt of its own keeps the others company in the collectives
        texts = _continue(config, chunks, tokenizer, [prompt for prompt, _ in mine], limit, vocab_size)
        if batch[rank::ranks]:
            right += sum(extract_answer(text) == answer for text, (_, answer) in zip(texts, mine, strict=True))
    total = torch.tensor(float(right), device=device())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total) / max(len(asked), 1), len(asked)


@torch.no_grad()
def _continue(config: Config, chunks: list, tokenizer, prompts: Sequence[Sequence[int]], limit: int, vocab_size: int) -> list[str]:
    """Greedy continuations up to end-of-text, `limit` tokens or the row's length."""
    room = config.data.seq_length
    tokens = torch.full((len(prompts), room), pad_id(tokenizer), device=device())
    lengths = torch.tensor([len(p) for p in prompts], device=device())
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    begin, done = lengths.clone(), torch.zeros(len(prompts), dtype=torch.bool, device=device())
    ends = (begin + limit).clamp(max=room)
    while bool((going := ~done & (lengths < ends)).any()):
        picked = _next_tokens(config, chunks, tokens, lengths, vocab_size)
        rows = going.nonzero()[:, 0]
        tokens[rows, lengths[rows]] = picked[rows]
        lengths += going
        done |= going & (picked == tokenizer.eos_token_id)
    return [tokenizer.decode(row[a:b].tolist(), skip_special_tokens=True) for row, a, b in zip(tokens, begin, lengths, strict=True)]


def _next_tokens(config: Config, chunks: list, tokens: Tensor, lengths: Tensor, vocab_size: int) -> Tensor:
    """[rows] most likely next token of each row, on every rank of the model."""
    multiple = math.lcm(16, config.parallel.tensor)  # sequence parallelism cuts the width
    width = min(config.data.seq_length, -(-int(lengths.max()) // multiple) * multiple)
    positions = torch.arange(width, device=tokens.device).expand(len(tokens), width)

    def forward_step(_, model):
        return model(tokens[:, :width], positions, None), lambda logits, **_: _argmax(logits, lengths, vocab_size)

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=[iter(()) for _ in chunks], model=chunks, num_microbatches=1, seq_length=width,
        micro_batch_size=len(tokens), forward_only=True, collect_non_loss_data=True,
    )  # fmt: skip
    picked = outputs[0] if outputs else torch.zeros_like(lengths)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(picked, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return picked


def _argmax(logits: Tensor, lengths: Tensor, vocab_size: int) -> Tensor:
    """[rows] id of the largest logit after each row's last token, over the true vocabulary of all tensor-parallel ranks."""
    last = logits[torch.arange(len(lengths), device=logits.device), lengths - 1].float()  # [rows, V/tp]
    start = parallel_state.get_tensor_model_parallel_rank() * last.shape[1]
    ids = start + torch.arange(last.shape[1], device=logits.device)
    value, column = last.masked_fill(ids >= vocab_size, -torch.inf).max(-1)
    mine = torch.stack((value, (start + column).float()), -1)  # ids are exact in fp32 up to 16.7 M
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    everyone = mine.new_empty((ranks * len(mine), 2))
    all_gather(everyone, mine.contiguous(), parallel_state.get_tensor_model_parallel_group())
    best = everyone.view(ranks, -1, 2)
    winner = best[..., 0].argmax(0, keepdim=True)
    return best[..., 1].gather(0, winner)[0].long()
