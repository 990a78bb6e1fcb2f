"""Greedy answers of the model being trained, and how many are right.

The prompts of a batch are continued together, one forward pass per token without a key-value cache: enough for the short answers of an
accuracy check during training; real rollouts are a rollout engine's work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_plugin.config import Config
from megatron_plugin.data import Conversation, ConversationEncoder, extract_answer, pad_id
from megatron_plugin.hooks.mcore import Groups, broadcast_from_last_stage, device, forward_backward, groups
from megatron_plugin.parallel.context import context_slice
from megatron_plugin.parallel.vocab import all_gather

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
    dp = groups().dp
    rank, ranks = dp.rank(), dp.size()
    right = 0
    for start in range(0, len(asked), BATCH * ranks):
        batch = asked[start : start + BATCH * ranks]
        mine = batch[rank::ranks] or batch[:1]  # a rank without a prompt of its own keeps the others company in the collectives
        texts = _continue(config, chunks, tokenizer, [prompt for prompt, _ in mine], limit, vocab_size)
        if batch[rank::ranks]:
            right += sum(extract_answer(text) == answer for text, (_, answer) in zip(texts, mine, strict=True))
    total = torch.tensor(float(right), device=device())
    dist.all_reduce(total, group=dp)
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
    parallel, ours, rows = config.parallel, groups(), len(tokens)
    multiple = math.lcm(16, 2 * parallel.context * parallel.tensor)  # context and sequence parallelism cut the width
    width = min(config.data.seq_length, -(-int(lengths.max()) // multiple) * multiple)
    parts = parallel.pipeline if parallel.virtual > 1 else 1  # the interleaved schedule takes that many micro-batches at a time
    filler = torch.full((-rows % parts,), rows - 1, device=tokens.device)
    micro_batches = torch.cat((torch.arange(rows, device=tokens.device), filler)).chunk(parts)
    positions_s = context_slice(torch.arange(width, device=tokens.device), 0, ours.cp)

    def forward_step(remaining, model):
        these = next(remaining)
        inputs = context_slice(tokens[these, :width], 1, ours.cp)
        logits = model(inputs, positions_s.expand_as(inputs), None)
        return logits, lambda logits, **_: _argmax(logits, positions_s, lengths[these], ours, vocab_size)

    shape = (len(micro_batches[0]), width)
    picked = forward_backward(forward_step, micro_batches, chunks, shape=shape, train=False, collect=True)
    return broadcast_from_last_stage(torch.cat(picked)[:rows] if picked else torch.zeros_like(lengths))


def _argmax(logits: Tensor, positions_s: Tensor, lengths: Tensor, ours: Groups, vocab_size: int) -> Tensor:
    """[rows] id of the largest logit after each row's last token, over the true vocabulary of all tensor-parallel ranks.

    logits [rows, s/C, V/tp]: the places `positions_s` of the rows; the last token of a row is on one of the context-parallel ranks."""
    mine_rs = positions_s == lengths[:, None] - 1
    last = logits[torch.arange(len(lengths), device=logits.device), mine_rs.int().argmax(1)].float()  # [rows, V/tp]
    if ours.cp.size() > 1:
        last = last.where(mine_rs.any(1, keepdim=True), 0.0)
        dist.all_reduce(last, group=ours.cp)
    ids = ours.tp.rank() * last.shape[1] + torch.arange(last.shape[1], device=logits.device)
    value, column = last.masked_fill(ids >= vocab_size, -torch.inf).max(-1)
    mine = torch.stack((value, ids[column].float()), -1)  # ids are exact in fp32 up to 16.7 M
    everyone = mine.new_empty((ours.tp.size() * len(mine), 2))
    all_gather(everyone, mine.contiguous(), ours.tp)
    best = everyone.view(ours.tp.size(), -1, 2)
    winner = best[..., 0].argmax(0, keepdim=True)
    return best[..., 1].gather(0, winner)[0].long()
