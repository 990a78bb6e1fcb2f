"""Keys of the section `rollout`: where on-policy samples come from, how they are judged, and how they enter the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["RolloutConfig"]


@dataclass(frozen=True)
class RolloutConfig:
    """On-policy training: each rollout batch is sampled by vLLM with the newest weights, rewarded, and trained on together with expert data."""

    engine: Literal["vllm", "server"] = "vllm"
    """vllm: child processes on the leader ranks' machines.  server: running servers, named in url."""
    url: list[str] = field(default_factory=list)
    """server: their addresses, such as http://10.0.0.7:8000; started by `megatron-plugin serve`."""
    engines: int = 1
    """vllm: child processes of the job, shared out over the data-parallel leaders in order."""
    tensor: int = 1
    """vllm: GPUs of one child."""
    devices: list[str] = field(default_factory=list)
    """vllm on GPUs: CUDA_VISIBLE_DEVICES of each child in order, such as ["4,5", "6,7"]; empty: that of its leader, whose GPU they share."""
    memory: float = 0.0
    """vllm: share of the GPU's memory in (0, 1], or GiB of key-value cache on a CPU; 0: 0.5 of a GPU, 0.25 GiB on a CPU."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """vllm: of the engine's weights; auto: train.dtype."""
    start_timeout_s: int = 300
    """Seconds an engine may take to start or to come back."""
    timeout_s: int = 600
    """Seconds one prompt's completions may take before they are asked of another engine."""
    max_restarts: int = 3
    """Restarts of one engine before the run ends with exit code 5; a run resumed later starts counting anew."""
    sleep: bool = False
    """The engine frees its GPU memory while the trainer trains (colocated); nothing on a CPU."""

    transfer: Literal["auto", "shm", "gloo", "nccl"] = "auto"
    """How weights travel: shm, shared memory of one machine; gloo, over the network between CPUs; nccl between GPUs.  auto: shm for children on
    a CPU, nccl on GPUs."""
    bind: str = "127.0.0.1"
    """gloo and nccl: the address of this machine that engines connect to; name one that they can reach, loopback reaches this machine only."""
    bucket_mb: int = 512
    """MiB of weights sent at a time; what one transfer holds beside the model."""
    checksums: bool = False
    """Engines verify every tensor they receive."""

    prompts: int = 32
    """Prompts of a rollout batch, over all data-parallel ranks: a multiple of those."""
    n: int = 8
    """Completions of each prompt: the group that advantages are taken over."""
    updates: int = 1
    """Optimizer steps on each rollout batch; with more than one, log-probabilities before the first are computed and clipped against.
    Divides prompts."""
    max_staleness: int = 0
    """1: the next rollout batch is sampled while this one is trained on, with the weights before it; 0: always the newest weights."""
    max_tokens: int = 256
    """Longest completion, in tokens; prompt and completion fit data.seq_length."""
    temperature: float = 1.0
    """Of sampling, and of the trainer's log-probabilities."""
    top_p: float = 1.0
    """Below 1, engine and trainer disagree about the discarded rest: only with a correction."""
    top_k: int = 0
    """0: all tokens; above 0 only with a correction."""

    reward: Any = "numeric"
    """numeric (the number after "####"), math (math-verify), format, package.module.function, or weights of several: {numeric: 1.0, format: 0.1}."""
    reward_timeout_s: float = 10.0
    """Seconds one answer may be judged for; then it is worth 0."""
    reward_network: bool = False
    """Whether reward workers may open network sockets: for a function of yours that asks a server."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """What (reward - mean of the group) is divided by: the group's standard deviation (GRPO), the batch's, or 1 (Dr. GRPO)."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over tokens (DAPO, CHORD), over sequences of their token means (GRPO), or sum over max_tokens x sequences (Dr. GRPO)."""
    correction: Literal["none", "sequence_tis", "sequence_mask", "opsm"] = "none"
    """Of the difference between the engine's and the trainer's log-probabilities, whole sequences at a time; per token: loss.tis, loss.icepop_low."""
    correction_bound: float = 2.0
    """Largest ratio (sequence_tis: truncated, sequence_mask: left out), or for opsm the mean log-ratio in nats above which it is left out."""
    dynamic_sampling: int = 0
    """Further batches of prompts asked for when groups have all-equal rewards, to fill the step with groups that teach (DAPO); 0: off."""
    overlong_buffer: int = 0
    """Tokens before max_tokens in which the reward falls linearly by overlong_penalty (DAPO); 0: off."""
    overlong_penalty: float = 1.0
    """Taken off the reward of a completion of max_tokens."""
    eval_n: int = 4
    """Sampled completions of each held-out prompt, beside the greedy one; 0: greedy only."""
    seed_samples: bool = True
    """Every request has a seed made of seed, step and prompt: the same weights give the same samples."""
