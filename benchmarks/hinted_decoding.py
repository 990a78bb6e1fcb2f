"""Hinted decoding: pairs drawn together by a real vLLM against one pair at a time by Hugging Face, each stream with its key-value cache.

    python -m benchmarks.hinted_decoding                    # 5 M and 100 M parameters, fp32
    python -m benchmarks.hinted_decoding --sizes 5M --rounds 3
    python -m benchmarks.hinted_decoding --dtype bf16       # both sides; what models are trained and served in
    python -m benchmarks.hinted_decoding --threads 2        # on a machine that does nothing else: threads that wait spin

Tokens per second of answers (each is drawn once and appended to both streams), medians of rounds in which the two take turns on the same machine with as
many threads each; Hugging Face with fewer where that is faster.  And CPU seconds, which a busy machine changes less.  Before anything is timed, what vLLM
says of its tokens is compared with Hugging Face's forward of both streams: pairs that are not mixed would be fast, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._machine import describe
from megatron_plugin.data import train_tokenizer
from megatron_plugin.rollout.hinted.decode import HintedDecoder, HintedPrompt
from megatron_plugin.rollout.hinted.engine import start_pair_engine
from megatron_plugin.rollout.hinted.lockstep import decode_in_lockstep, mixed_distributions
from megatron_plugin.rollout.hinted.mixing import Phase, mix
from megatron_plugin.rollout.hinted.options import HintedOptions
from megatron_plugin.rollout.transfer import send_weights
from megatron_plugin.rollout.transports.shm import SharedMemory
from megatron_plugin.rollout.vllm_process import EngineOptions, _members
from megatron_plugin.rollout.vllm_versions import installed_vllm

TARGET = 10.0  # times the tokens per second
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREE = {"fp32": 1e-3, "bf16": 0.1}
"""Nats, |vLLM's log-probability - Hugging Face's| of a drawn token at temperature 0.3 (which multiplies it by 3.3): the largest in fp32, the median in bf16."""
SIZES = {"5M": (256, 4, 4096), "100M": (768, 12, 16384)}  # hidden, layers, vocabulary
SHARP = 6.0
PAIRS, PLAIN, HINTED = 32, 60, 200  # pairs; tokens of prompts


def _model(folder: Path, size: str, dtype: torch.dtype) -> LlamaForCausalLM:
    hidden, layers, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, intermediate_size=8 * hidden // 3,
        vocab_size=vocabulary, max_position_embeddings=1024, initializer_range=0.04, bos_token_id=None, eos_token_id=1, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= SHARP  # a new model is unsure of everything, and its nuclei as wide as no trained one's
    return model.to(dtype)


def _prompts(vocabulary: int, rounds: int) -> list[list[HintedPrompt]]:
    """Fresh ones for each round: nothing is in the prefix cache."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for number in range(rounds):
        streams = [torch.randint(10, vocabulary, (PAIRS, length), generator=draw).tolist() for length in (PLAIN, HINTED)]
        made.append([HintedPrompt(f"{number}:{i}", plain, hint + plain) for i, (plain, hint) in enumerate(zip(*streams, strict=True))])
    return made


def _measure(size: str, tokens: int, rounds: int, threads: int, dtype: str) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _model(folder, size, DTYPES[dtype])
        vocabulary = model.config.vocab_size
        tokenizer = train_tokenizer(["a text for a tokenizer"], folder / "tokenizer", vocab_size=270)
        options = HintedOptions(vocab_size=vocabulary, end_ids=(vocabulary - 1,), max_tokens=tokens)  # the authors' defaults otherwise
        served = EngineOptions(
            model_dir=name, dtype=str(DTYPES[dtype]).removeprefix("torch."), max_model_len=1024, max_num_seqs=2 * PAIRS, kv_cache_bytes=3 << 30, threads=threads, log=f"{name}/log"
        )  # fmt: skip
        engine = start_pair_engine(served, folder / "tokenizer")
        try:
            send_weights([engine], model.state_dict().items(), version=1, transport=SharedMemory())
            decoder = HintedDecoder(engine, options, tokenizer)
            batches = _prompts(vocabulary, rounds + 1)
            off = _warm_up(model, decoder, options, batches.pop(), dtype)
            rows = [_round(model, decoder, options, batch, threads) for batch in batches]
        finally:
            engine.close()
    middle = {kind: statistics.median(row[kind] for row in rows) for kind in ("vllm", "alone", "vllm_cpu", "alone_cpu")}
    return dict(
        size=size, dtype=dtype, pairs=PAIRS, tokens=tokens, threads=threads, rounds=rows, **middle, times=middle["vllm"] / middle["alone"],
        times_cpu=middle["alone_cpu"] / middle["vllm_cpu"], off_nats=off,
    )  # fmt: skip


def _warm_up(model, decoder: HintedDecoder, options: HintedOptions, prompts: list[HintedPrompt], dtype: str) -> float:
    """Disagreement, nats (AGREE).  Ends the program where it is too large."""
    run = decoder.run(prompts)
    if len(run.samples) != PAIRS or run.counts["desynchronised"]:
        raise SystemExit(f"expected {PAIRS} answers in step, got {run}: nothing was timed")
    off = []
    for prompt in prompts[:4]:
        sample = run.samples[prompt.key]
        truth = mixed_distributions(model, prompt.plain_ids, prompt.hinted_ids, sample.token_ids, options, decoder.tokenizer).log()
        drawn = truth[range(len(sample.token_ids)), list(sample.token_ids)]
        off.append((drawn - torch.tensor(sample.logp)).abs())
    disagreement = torch.cat(off).max().item() if dtype == "fp32" else torch.cat(off).median().item()
    if not disagreement < AGREE[dtype]:
        raise SystemExit(f"vLLM's log-probabilities are {disagreement:.3g} nats off, expected less than {AGREE[dtype]}: nothing was timed")
    decode_in_lockstep(model, prompts[0].plain_ids, prompts[0].hinted_ids, options, decoder.tokenizer, _fast_mix)
    return disagreement


def _fast_mix(hinted_V: torch.Tensor, plain_V: torch.Tensor, options: HintedOptions, *, first: bool, plain_only: bool) -> torch.Tensor:
    """The rival at its best: the oracle's own takes 0.84 ms a token at V = 4096, an eighth of its time."""
    phase = Phase.PLAIN if plain_only else Phase.FIRST if first else Phase.MIXED
    return torch.softmax(mix(hinted_V[None], plain_V[None], [phase], options)[0] / options.temperature, -1)


def _round(model, decoder: HintedDecoder, options: HintedOptions, prompts: list[HintedPrompt], threads: int) -> dict:
    """Tokens per second, and CPU milliseconds per token: of one answer by Hugging Face, then of all of them by vLLM and this process."""
    alone = []
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        begin, cpu = time.perf_counter(), time.process_time()
        answer = decode_in_lockstep(model, prompts[0].plain_ids, prompts[0].hinted_ids, options, decoder.tokenizer, _fast_mix)
        tokens = len(answer.token_ids)
        alone.append((tokens / (time.perf_counter() - begin), 1e3 * (time.process_time() - cpu) / tokens))
    torch.set_num_threads(1)
    begin, cpu = time.perf_counter(), _cpu_seconds(decoder)
    run = decoder.run(prompts)
    seconds, cpu = time.perf_counter() - begin, _cpu_seconds(decoder) - cpu
    fastest, alone_cpu = max(alone)
    return {"alone": fastest, "alone_cpu": alone_cpu, "vllm": run.tokens / seconds, "vllm_cpu": 1e3 * cpu / run.tokens, "torn": run.torn}


def _cpu_seconds(decoder: HintedDecoder) -> float:
    """Of this process and all of the server's, since they were started."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in _members(decoder.engine.process.popen.pid)]
    return time.process_time() + sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each of the two")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights, activations and key-value caches")
    parser.add_argument("--out", help="JSON of all rounds and the machine")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    facts = describe("cpu") | {"vllm": installed_vllm()}
    print(
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_before']}, vLLM {facts['vllm']}, torch {torch.__version__}, commit {facts['commit']}, "
        f"threads {chosen.threads}"
    )
    rows = []
    for size in chosen.sizes:
        rows.append(row := _measure(size, chosen.tokens, chosen.rounds, chosen.threads, chosen.dtype))
        for one in row["rounds"]:
            print(
                f"  {size}: one pair at a time {one['alone']:8.2f} tokens/s, {one['alone_cpu']:6.2f} ms of CPU a token   "
                f"{PAIRS} pairs in vLLM {one['vllm']:8.1f} tokens/s, {one['vllm_cpu']:6.3f} ms   out of step {len(one['torn'])}"
            )
        print(f"{size} {row['dtype']}, {row['tokens']} tokens, medians: {row['alone']:.2f} and {row['vllm']:.1f} tokens/s, {row['times']:.1f} times; target {TARGET:g} times "
              f"{'met' if row['times'] >= TARGET else 'missed'}; CPU {row['times_cpu']:.1f} times less; disagreement {row['off_nats']:.2g} nats",
              flush=True)  # fmt: skip
    if chosen.out:
        Path(chosen.out).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
