"""Fine-tune a real megatron-core GPTModel with a token-weighted loss.  This file is the documentation of the drop-in.

    torchrun --nproc-per-node 2 examples/megatron_core_dft.py --tp 2 --loss dft --data train.jsonl --eval-data test.jsonl --steps 200

What makes it ours is marked (1) to (4); the rest is any megatron-core script.  NCCL with GPUs, gloo and CPU tensors without; DP is what
--tp and --pp leave.  Losses are the same at every TP and DP (pipeline stages draw weights of their own).  Without --data: small sums.
DFT needs a model that already predicts: from random weights each token weighs 1/257, the most frequent byte wins, and only spaces are
written (GSM8K, lr 2e-3: held-out NLL 5.6 -> 11.0).  So --warm-steps of SFT come first, for want of a checkpoint (NLL 5.62 -> 2.12).  DFT
then sharpens: in 200 steps the right byte's probability rises, .25 -> .32, and so does NLL, 2.12 -> 2.48.  Read both; neither is the loss.
"""

import argparse
import json
import os
import random
import sys
import time
import warnings
from functools import partial

import torch

warnings.filterwarnings("ignore", module=r"megatron\.core")  # a page about Transformer Engine and apex, from every rank
# ruff: noqa: E402
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from megatron_plugin import TokenInputs, bind
from megatron_plugin.hooks.cpu_platform import cpu_platform
from megatron_plugin.hooks.forward_step import make_loss_func
from megatron_plugin.hooks.local_spec import block_spec
from megatron_plugin.hooks.mcore import adam, data_parallel_size, forward_backward
from megatron_plugin.hooks.report import token_means

HEADS, END, VOCABULARY, PADDED = 4, 256, 257, 384  # 256 bytes and end-of-text, padded for the usual TP sizes; the loss masks the padding
OPTIONS = {
    "tp": 1, "pp": 1, "loss": "dft", "loss_params": "{}", "data": "", "eval_data": "", "steps": 200, "lr": 2e-5, "warm_steps": 150,
    "warm_lr": 2e-3, "eval_every": 50, "eval_batches": 8, "seq_length": 512, "micro_batch": 4, "global_batch": 8, "layers": 4, "hidden": 128
}  # fmt: skip
RANK, WORLD, LOCAL = (int(os.environ.get(name, default)) for name, default in [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)])
DEVICE = torch.device("cuda", LOCAL) if torch.cuda.is_available() else torch.device("cpu")


def say(text, means=None):
    if RANK == WORLD - 1:  # on the last pipeline stage, which knows the loss
        print(text, *(f"{name} {means[name]:.5f}" for name in ("lm loss", "nll", "token_prob", "entropy") if means), flush=True)


def stop(code, text):  # 2: configuration, 4: data.  On every rank: torchrun kills the others when the first one stops
    print(f"error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def read(path):  # [(question, answer)] in bytes
    rows, line = [], b""
    try:
        for line in open(path, "rb"):
            row = json.loads(line)
            rows.append((row["question"].encode(), row["answer"].encode()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"{path}:{len(rows) + 1}: got {line[:60]!r} ({type(error).__name__}: {error})"
        stop(4, found + ', expected a file with one {"question": "text", "answer": "text"} per line; mend or delete what is not')
    return rows


def encode(rows, args, what, least):  # tokens, labels, loss_mask [examples, seq_length]; the loss is on the answer and its end-of-text
    fit = [(len(q), [*q, *b"\n", *a, END]) for q, a in rows if len(q) + len(a) < args.seq_length]
    say(f"{what}: {len(fit)} examples; {len(rows) - len(fit)} more are longer than --seq-length {args.seq_length} and left out")
    if len(fit) < least:
        stop(4, f"{what}: got {len(fit)} examples that fit, expected {least} or more; raise --seq-length, or lower --global-batch")
    ids, mask = torch.full((len(fit), args.seq_length + 1), END), torch.zeros(len(fit), args.seq_length)
    for row, (question, text) in enumerate(fit):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, question : len(text) - 1] = 1  # position i predicts byte i + 1; the first one predicted follows the newline
    return ids[:, :-1], ids[:, 1:], mask


def build(args):
    config = TransformerConfig(
        num_layers=args.layers, hidden_size=args.hidden, num_attention_heads=HEADS, normalization="RMSNorm", add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, tensor_model_parallel_size=args.tp, pipeline_model_parallel_size=args.pp,
        pipeline_dtype=torch.float32, batch_p2p_sync=False, use_cpu_initialization=True, calculate_per_token_loss=True,  # (1)
    )  # fmt: skip
    model = GPTModel(
        config=config, transformer_layer_spec=block_spec(config), vocab_size=PADDED, position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        max_sequence_length=args.seq_length,
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads  # (1) sums gradients over DP and divides them by the tokens of the step
    return config, DistributedDataParallel(config=config, ddp_config=DistributedDataParallelConfig(), module=model.to(DEVICE))


def forward_step(loss_func, micro_batches, model):  # advantage: grpo asks for it, and a demonstration is worth following
    tokens, labels, loss_mask = (x.to(DEVICE) for x in next(micro_batches))
    logits = model(tokens, torch.arange(tokens.shape[1], device=DEVICE).expand_as(tokens), None)  # (2) no labels: logits [b, s, V/tp]
    return logits, partial(loss_func, labels=labels, loss_mask=loss_mask, inputs=TokenInputs(advantage=torch.ones_like(loss_mask)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    try:
        sizes = ("layers", "hidden", "micro_batch", "global_batch", "seq_length", "steps", "eval_every", "eval_batches")
        dp = data_parallel_size(WORLD, args.tp, args.pp, heads=HEADS, vocabulary=PADDED, **{name: getattr(args, name) for name in sizes})
        bound = bind(args.loss, **json.loads(args.loss_params))
    except (ValueError, TypeError) as error:
        stop(2, error)
    sums = [(b"%d+%d=?" % (a, b), b"%d" % (a + b)) for a in range(10, 100) for b in range(10, 100)]
    rows = read(args.data) if args.data else random.Random(1234).sample(sums, len(sums))
    held_out, shape = args.eval_batches * args.global_batch, (args.micro_batch, args.seq_length)
    test = read(args.eval_data) if args.eval_data else [rows.pop() for _ in rows[:held_out]]
    data, test = encode(rows, args, "train", args.global_batch), encode(test, args, "held out", held_out)
    torch.cuda.set_device(LOCAL if DEVICE.type == "cuda" else -1)  # -1: do nothing
    torch.distributed.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    parallel_state.initialize_model_parallel(args.tp, args.pp)
    torch.manual_seed(1234)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    config, model = build(args)

    def run(loss_func, data, indices, train):
        micro = [[x[i] for x in data] for i in indices[parallel_state.get_data_parallel_rank() :: dp].split(args.micro_batch)]
        reports = forward_backward(partial(forward_step, loss_func), micro, [model], shape=shape, train=train)
        return token_means(reports, group=parallel_state.get_data_parallel_group())  # (4)

    seen = 0
    for name, loss, steps, lr in [("sft", "sft", args.warm_steps, args.warm_lr), (args.loss, bound, args.steps, args.lr)]:
        loss_func = make_loss_func(loss, config, vocab_size=VOCABULARY)  # (3)
        say(f"held out, before {steps} steps of {name}:", run(loss_func, test, torch.arange(held_out), train=False))
        optimizer, scheduler = adam(config, [model], lr=lr, steps=max(steps, 1))
        for step in range(1, steps + 1):
            began = time.time()
            model.zero_grad_buffer()
            optimizer.zero_grad()
            means = run(loss_func, data, torch.arange(seen, seen := seen + args.global_batch) % len(data[0]), train=True)
            _, grad_norm, _ = optimizer.step()
            scheduler.step(1)
            say(f"{name} {step}/{steps} tokens/s {means.get('num_tokens', 0) / (time.time() - began):.0f} grad_norm {grad_norm:.4f}", means)
            if step % args.eval_every == 0 or step == steps:
                say(f"held out, after {step} steps of {name}:", run(loss_func, test, torch.arange(held_out), train=False))
    say(f"done: {args.warm_steps} steps of sft, then {args.steps} of {args.loss}, at TP{args.tp} PP{args.pp} DP{dp} on {DEVICE.type}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with cpu_platform():
        main()
