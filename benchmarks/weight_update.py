"""What a weight update costs end to end: a real vLLM on this machine's CPU, 110 M parameters, through shared memory and through gloo.

    python -m benchmarks.weight_update                      # bf16 and fp32, with and without checksums; two vLLM servers at a time
    python -m benchmarks.weight_update --quick              # bf16 only, three rounds

Seconds from begin (generation stops) to finish (generation goes on); median of rounds in which the contenders take turns, with the 20th and 80th
percentile.  `begin` waits for running requests and prepares the layers, `load` is the engine's part of a bucket, `finish` completes the layers and
empties the prefix cache, `ours` is the rest: copies into the bucket, checksums, threads.  `copy`: one copy of as many bytes, timed in the same rounds.
`cpu`: processor seconds of trainer and server together, which say on a busy machine what the update itself takes (the two mostly wait for each other).
Every update sends other weights.  In the first round and the last, log-probabilities of the engine are compared with Hugging Face's forward, and those of
one update earlier must be off: an update that leaves the old weights is fast, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._machine import describe
from megatron_plugin.rollout.engine import SamplingParams
from megatron_plugin.rollout.transfer import TRANSPORTS, send_weights
from megatron_plugin.rollout.vllm_http import start_engine
from megatron_plugin.rollout.vllm_process import EngineOptions, _members
from megatron_plugin.rollout.vllm_versions import installed_vllm

TARGET_S = 1.0
PROMPT = [(7 * i) % 16000 for i in range(200)]  # longer than a block of the prefix cache
# nats, mean |engine - Hugging Face's forward in the same dtype|; weights of one update earlier must be off by STALE at least
AGREE = {"bfloat16": 0.1, "float32": 1e-4}
STALE = 0.3
PHASES = {"begin_update": "begin_s", "init_transfer": "begin_s", "push": "load_s", "finish_update": "finish_s"}


class Timed:
    """An engine that keeps the seconds of each phase of the update under way."""

    def __init__(self, engine):
        self.engine = engine
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name):
        value, phase = getattr(self.engine, name), PHASES.get(name)
        if phase is None:
            return value

        def timed(*arguments):
            start = time.perf_counter()
            try:
                return value(*arguments)
            finally:
                self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

        return timed


def _model(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, intermediate_size=2048, vocab_size=16384,
        max_position_embeddings=512, initializer_range=0.04, bos_token_id=None, eos_token_id=1, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return LlamaForCausalLM(config).eval()


def _disagreement(engine, model: LlamaForCausalLM) -> float:
    """Mean |log-probability of the engine - that of Hugging Face's forward in the model's dtype|, nats."""
    (answer,) = engine.generate(PROMPT, SamplingParams(max_tokens=16, seed=1), timeout_s=120)
    ids = torch.tensor([[*PROMPT, *answer.token_ids]])
    with torch.no_grad():
        logp = model(ids).logits[0, len(PROMPT) - 1 : -1].float().log_softmax(-1)
    truth = logp.gather(1, ids[0, len(PROMPT) :, None])[:, 0]
    return (torch.tensor(answer.logprobs) - truth).abs().mean().item()


def _update(engine, model, transport, *, checksums: bool, look: bool) -> dict[str, float]:
    """Other weights, sent: seconds of each phase.  look: compare what the engine then says.  SystemExit for an engine that did not follow."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.roll(1, -1))
    where = f"{transport.backend}, {engine.options.dtype}"
    if look and engine.weight_version is not None and (off := _disagreement(engine, model)) < STALE:
        raise SystemExit(f"{where}: weights of one update earlier are only {off:.3g} nats off: this would show nothing")
    timed, cpu = Timed(engine), _cpu_s(engine)
    report = send_weights([timed], model.state_dict().items(), version=engine.newest_version + 1, transport=transport, checksums=checksums)
    if report.lost:
        raise SystemExit(f"{where}: the engine was lost")
    facts = timed.seconds | {"seconds": report.seconds, "cpu_s": _cpu_s(engine) - cpu, "ours_s": report.seconds - sum(timed.seconds.values())}
    if look:
        facts["off_nats"] = _disagreement(engine, model)
        if not facts["off_nats"] < AGREE[engine.options.dtype]:
            raise SystemExit(f"{where}: the engine's log-probabilities are {facts['off_nats']:.3g} nats off: nothing was timed")
    return facts | {"bytes": report.bytes, "buckets": report.buckets}


def _cpu_s(engine) -> float:
    """Processor seconds of this process and of the engine's since they began."""
    times = [psutil.Process(pid).cpu_times() for pid in (os.getpid(), *_members(engine.process.popen.pid))]
    return sum(time.user + time.system for time in times)


def _copy_s(model: LlamaForCausalLM) -> float:
    """Seconds of one copy of all weights, into memory that was written before."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    source, target = torch.ones(2, size, dtype=torch.uint8)
    start = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - start


def _measure(dtype: str, rounds: int) -> list[dict]:
    """Rows of one dtype: every contender once in each round."""
    with tempfile.TemporaryDirectory() as name:
        model, engines, transports, copies = _model(Path(name)).to(getattr(torch, dtype)), {}, {}, []
        arms: dict[tuple[str, bool], list[dict]] = {(transfer, checksums): [] for checksums in (False, True) for transfer in ("shm", "gloo")}
        try:
            for transfer in ("shm", "gloo"):
                options = EngineOptions(model_dir=name, dtype=dtype, max_model_len=512, kv_cache_bytes=256 << 20, transfer=transfer, log=f"{name}/{transfer}")
                engines[transfer], transports[transfer] = start_engine(options), TRANSPORTS[transfer]()
            for number in range(rounds + 1):  # the first update of a server imports transformers and faults its memory in: a round of its own
                for (transfer, checksums), found in arms.items():
                    look = number in (0, rounds)
                    found.append(_update(engines[transfer], model, transports[transfer], checksums=checksums, look=look))
                copies.append(_copy_s(model))
        finally:
            for transfer, engine in engines.items():
                engine.close()
                transports[transfer].close()
    return [_row(transfer, dtype, checksums, found, copies[1:], engines[transfer].process.start_s) for (transfer, checksums), found in arms.items()]


def _row(transfer: str, dtype: str, checksums: bool, found: list[dict], copies: list[float], start_s: float) -> dict:
    first, *rest = found
    seconds = sorted(update["seconds"] for update in rest)
    phases = {name: statistics.median(update[name] for update in rest) for name in ("cpu_s", "begin_s", "ours_s", "load_s", "finish_s")}
    return dict(
        transfer=transfer, dtype=dtype, checksums=checksums, megabytes=first["bytes"] / 1e6, buckets=first["buckets"], first_s=first["seconds"],
        median_s=statistics.median(seconds), p20_s=seconds[int(0.2 * len(seconds))], p80_s=seconds[min(int(0.8 * len(seconds)), len(seconds) - 1)], **phases,
        copy_s=statistics.median(copies), off_nats=max(first["off_nats"], rest[-1]["off_nats"]), start_s=start_s, seconds=seconds,
    )  # fmt: skip


COLUMNS = {"first s": "first_s", "median s": "median_s", "p20": "p20_s", "p80": "p80_s", "cpu": "cpu_s", "begin": "begin_s", "ours": "ours_s",
           "load": "load_s", "finish": "finish_s", "copy": "copy_s"}  # fmt: skip


def _line(row: dict) -> str:
    met = ("met" if row["median_s"] < TARGET_S else "missed") if row["dtype"] == "bfloat16" else ""
    numbers = "".join(f"{row[key]:9.3f}" for key in COLUMNS.values())
    return f"{row['transfer']:6}{row['dtype']:10}{'yes' if row['checksums'] else 'no':10}{row['megabytes']:5.0f}{numbers}{row['off_nats']:11.2g}  {met}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=9, help="timed, after one that is not")
    parser.add_argument("--out", help="JSON of all rows and the machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = describe("cpu") | {"vllm": installed_vllm()}
    print(f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_before']}, vLLM {facts['vllm']}, torch {torch.__version__}, commit {facts['commit']}")
    print(f"{'':6}{'dtype':10}{'checksums':10}{'MB':>5}{''.join(f'{name:>9}' for name in COLUMNS)}{'off, nats':>11}  target {TARGET_S:g} s, bf16")
    rows = []
    for dtype in ("bfloat16",) if options.quick else ("bfloat16", "float32"):
        rows += _measure(dtype, 3 if options.quick else options.rounds)
        print("\n".join(_line(row) for row in rows[-4:]), flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
