"""What a weight update costs end to end: a real vLLM on this machine's CPU, 100 M parameters, through shared memory and through gloo.

    python -m benchmarks.weight_update                      # bf16 and fp32, with and without checksums; two starts of vLLM for each dtype
    python -m benchmarks.weight_update --quick              # bf16 only, three updates each

Seconds from begin (generation stops) to finish (generation goes on).  Before anything is timed, log-probabilities of the engine are compared with Hugging
Face's forward: an update that leaves the old weights is fast, too.  Every update sends other weights; the last one is compared again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._machine import describe
from megatron_plugin.rollout.engine import SamplingParams
from megatron_plugin.rollout.transfer import TRANSPORTS, send_weights
from megatron_plugin.rollout.vllm_http import start_engine
from megatron_plugin.rollout.vllm_process import EngineOptions
from megatron_plugin.rollout.vllm_versions import installed_vllm

TARGET_S = 1.0
PROMPT = [(7 * i) % 16000 for i in range(200)]  # longer than a block of the prefix cache
# nats, mean |engine - Hugging Face's forward in the same dtype|; weights of one update earlier must be off by STALE at least
AGREE = {"bfloat16": 0.1, "float32": 1e-4}
STALE = 0.3


def _model(folder: Path) -> LlamaForCausalLM:
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


def _rows(transfer: str, dtype: str, updates: int) -> list[dict]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        model = _model(Path(name)).to(getattr(torch, dtype))
        engine = start_engine(EngineOptions(model_dir=name, dtype=dtype, max_model_len=512, kv_cache_bytes=256 << 20, transfer=transfer, log=f"{name}/log"))
        transport = TRANSPORTS[transfer]()
        rows, version = [], 0
        try:
            for checksums in (False, True):
                seconds = []
                for _ in range(updates + 1):  # the first one of a server imports transformers and faults its memory in; not counted
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.copy_(parameter.roll(1, -1))
                    if version and (off := _disagreement(engine, model)) < STALE:
                        raise SystemExit(f"{transfer} {dtype}: weights of one update earlier are only {off:.3g} nats off: this would show nothing")
                    version += 1
                    report = send_weights([engine], model.state_dict().items(), version=version, transport=transport, checksums=checksums)
                    seconds.append(report.seconds)
                    if len(seconds) in (1, updates + 1) and not (off := _disagreement(engine, model)) < AGREE[dtype]:
                        raise SystemExit(f"{transfer} {dtype}: the engine's log-probabilities are {off:.3g} nats off: nothing was timed")
                rows.append(dict(transfer=transfer, dtype=dtype, checksums=checksums, megabytes=report.bytes / 1e6, buckets=report.buckets, first_s=seconds[0],
                                 median_s=statistics.median(seconds[1:]), worst_s=max(seconds[1:]), off_nats=off, start_s=engine.process.start_s))  # fmt: skip
        finally:
            engine.close()
            transport.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--updates", type=int, default=7, help="timed, after one that is not")
    parser.add_argument("--out", help="JSON of all rows and the machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = describe("cpu") | {"vllm": installed_vllm()}
    print(f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_before']}, vLLM {facts['vllm']}, torch {torch.__version__}, commit {facts['commit']}")
    print(f"{'transfer':9}{'dtype':10}{'checksums':10}{'MB':>6}{'buckets':>9}{'first s':>9}{'median s':>10}{'worst s':>9}{'off, nats':>11}{'start s':>9}  target")
    rows = []
    for dtype in ("bfloat16",) if options.quick else ("bfloat16", "float32"):
        for transfer in ("shm", "gloo"):
            for row in _rows(transfer, dtype, 3 if options.quick else options.updates):
                rows.append(row)
                met = ("met" if row["median_s"] < TARGET_S else "missed") if dtype == "bfloat16" else ""
                print(f"{transfer:9}{dtype:10}{'yes' if row['checksums'] else 'no':10}{row['megabytes']:6.0f}{row['buckets']:9}{row['first_s']:9.3f}"
                      f"{row['median_s']:10.3f}{row['worst_s']:9.3f}{row['off_nats']:11.2g}{row['start_s']:9.1f}  {met}", flush=True)  # fmt: skip
    if options.out:
        Path(options.out).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
