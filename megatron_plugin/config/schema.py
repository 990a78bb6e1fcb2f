"""Every key of a configuration: its type, default, unit and meaning.  A test compares configs/README.md with this file.

A *row* is one line of the batch, `data.seq_length` tokens.  A *step* is one optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron_plugin.config.loss_roles import LossRole, role_of
from megatron_plugin.config.rollout import RolloutConfig

__all__ = [
    "CheckpointConfig", "Config", "DataConfig", "GPTArguments", "LogConfig", "MuConfig", "ParallelConfig", "ProfileConfig", "RampConfig", "RolloutConfig",
    "TrainConfig",
]  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and how fast: AdamW."""

    steps: int = 200
    """Optimizer steps in all, counted from step 0 of the run, also after a resume."""
    micro_batch: int = 4
    """Rows of one forward pass on one data-parallel rank."""
    global_batch: int = 16
    """Rows of one step, over all data-parallel ranks: a multiple of micro_batch x data-parallel ranks.  On-policy, a step has the rows that its
    samples fill, and this is not used."""
    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up to lr; fewer than steps."""
    lr_decay: Literal["cosine", "linear", "constant"] = "cosine"
    """From lr after the warm-up to min_lr at the last step; constant stays at lr."""
    weight_decay: float = 0.01
    """Decoupled, on matrices only (megatron-core leaves biases and norms out)."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Global gradient norm above which the gradient is scaled down; 0: never."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations; with bf16, megatron-core keeps fp32 master weights and fp32 gradients."""
    log_interval: int = 1
    """Steps between lines on the terminal; metrics.jsonl always has every step."""
    eval_interval: int = 50
    """Steps between evaluations on data.eval; 0: only at the end."""
    max_nonfinite: int = 3
    """Steps in a row whose loss or gradient is not a number on some rank, after which the run ends with exit code 17.  None of them is applied: weights
    and moments stay, while step number, learning rate and data go on.  Each is kept in <run_dir>/replay."""
    spike_factor: float = 10.0
    """A step whose loss or NLL (on-policy: NLL) is above so many times the median of the last 100 is marked in train/spike and said with its samples;
    above 1, or 0: never.  The first 20 steps are not judged."""
    skip_spikes: bool = False
    """Whether such a step is not applied."""
    timeout_s: int = 600
    """Seconds one rank waits for the others in a collective before the job ends with an error."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks are used.  What is left over (world size / (tensor x pipeline x context)) is data parallel."""

    tensor: int = 1
    """Ranks that share each weight matrix and the vocabulary; Megatron's tensor_model_parallel_size."""
    pipeline: int = 1
    """Stages the layers are cut into; Megatron's pipeline_model_parallel_size."""
    virtual: int = 1
    """Chunks of layers per stage (interleaved schedule); 1: one chunk, not interleaved."""
    context: int = 1
    """Ranks that share each row's tokens, zig-zag; 2 x context must divide data.seq_length.  Megatron's context_parallel_size."""
    sequence: bool = False
    """Norms and dropout on 1/tensor of the row's tokens; needs tensor > 1."""
    distributed_optimizer: bool = False
    """Optimizer state cut over the data- and context-parallel ranks (ZeRO-1); Megatron's use_distributed_optimizer."""


@dataclass(frozen=True)
class MuConfig:
    """The share of expert data over the steps (schedules/mu.py), for chord, in place of its preset's.  Leave the section out with others."""

    warmup_steps: int = 0
    """Steps from 0 up to peak."""
    decay_steps: int = 0
    """Steps from peak down to valley, half a cosine."""
    peak: float = 0.1
    """Share in [0, 1] after the warm-up."""
    valley: float = 0.1
    """Share in [0, peak] after the decay."""


@dataclass(frozen=True)
class RampConfig:
    """How the weights of idft go from those of dft to their own (schedules/ramp.py): the parameter `ramp` of a loss that has one, from step to
    step.  Leave the section out for a constant loss.ramp.  The defaults are those of the released trainer."""

    warmup_ratio: float = 0.2
    """Share of train.steps in [0, 1] at ramp 0, which is dft."""
    transition_ratio: float = 0.1
    """Share of train.steps in [0, 1] over which the ramp rises to 1, behind the warm-up; 0: at once."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and what is evaluated on.  Paths are relative to the working directory."""

    train: list[str] = field(default_factory=list)
    """jsonl files, a list or one path; empty: the embedded arithmetic problems.  On-policy: the demonstrations."""
    eval: list[str] = field(default_factory=list)
    """Held-out jsonl, a list or one path; empty: the embedded held-out and harder splits if train is empty too, else no evaluation."""
    prompts: list[str] = field(default_factory=list)
    """On-policy: jsonl of questions with reference answers, a list or one path; empty: the embedded ones, of which none is in train or eval, if
    train is empty too, else the questions of train."""
    expert_samples: int = 32
    """On-policy: samples of data.train in one step, over all data-parallel ranks; 0, or a loss without expert tokens: none."""
    tokenizer: str = ""
    """A Hugging Face tokenizer directory.  Empty: that of the run in checkpoint.init, else a byte-level BPE trained on data.train; either is
    saved in the run directory."""
    chat_template: str = ""
    """A file with a Jinja chat template to use instead of the tokenizer's own."""
    bpe_vocab_size: int = 1024
    """Largest vocabulary of the BPE trained on the spot, in tokens; at least 263 (bytes and control tokens)."""
    seq_length: int = 512
    """Tokens per row."""
    packing: bool = True
    """Several samples per row, each attending to itself only; false: one sample per row, the rest padding."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns have a loss."""
    overlong: Literal["error", "truncate", "drop"] = "error"
    """What happens to samples longer than seq_length."""
    on_bad_line: Literal["error", "skip"] = "error"
    """What happens to lines of train and prompts that cannot be used; in held-out files they are always an error."""
    max_bad_fraction: float = 0.001
    """With skip: the share of bad lines in [0, 1] above which the run ends."""
    eval_samples: int = 200
    """Samples of each eval file that are used, from its start; 0: all."""
    eval_answers: int = 200
    """Held-out questions of each file that are answered greedily after the last step, for the accuracy; 0: none.  Without a key-value cache:
    seconds for the embedded problems, minutes for long answers."""
    filler: float = 0.0
    """Embedded problems only: probability of a meaningless word before each worked line of the training answers."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept in <run_dir>/checkpoints, and where a run starts."""

    interval: int = 0
    """Steps between checkpoints; 0: only after the last step."""
    resume: str = "auto"
    """auto: the newest checkpoint of run_dir if there is one; never: run_dir must hold none; or a path, of a checkpoint or run directory.
    Weights, optimizer and place in the data go on."""
    init: str = ""
    """A run directory or checkpoint to take only the weights from, at step 0; ignored when the run resumes.  Empty: random weights."""
    keep: int = 2
    """Newest checkpoints kept; 0: all."""
    best: str = ""
    """A metric of the evaluations, such as eval/heldout_nll: the checkpoint where it was best is kept too, beyond `keep`, and named in checkpoints/best.
    Lower is better for those that end with nll or loss, higher for all others.  Empty: none."""
    asynchronous: bool = False
    """Write the files while training goes on.  It needs host memory for a copy of weights and optimizer state."""
    may_differ: list[str] = field(default_factory=list)
    """Fields of `model` that may be other than in the checkpoint, such as rotary_base for a longer context; any other difference is refused."""


@dataclass(frozen=True)
class LogConfig:
    """Where the metrics go beside metrics.jsonl and TensorBoard, which always have them.  Keys of these services come from their own environment
    variables and files, never from here."""

    wandb: str = ""
    """A project of Weights & Biases, as project or entity/project; empty: none.  WANDB_MODE=offline keeps it on disk."""
    mlflow: str = ""
    """Where MLflow keeps its runs: http(s)://host:port, sqlite:///path or a directory; empty: nowhere.  Its experiment is MLFLOW_EXPERIMENT_NAME, or
    megatron-plugin."""
    run_name: str = ""
    """What the run is called there; empty: the name of run_dir."""
    peak_tflops: float = 0.0
    """The most that one device can do with matrix products of train.dtype, TFLOP/s, for perf/mfu; 0: by the device's name, where it is known."""


@dataclass(frozen=True)
class ProfileConfig:
    """torch's profiler over a few steps: a Chrome trace for each rank in <run_dir>/profile (chrome://tracing, ui.perfetto.dev)."""

    first_step: int = 0
    """The step that it begins with, at most train.steps; 0: never.  The first steps of a run compile kernels and fill caches: 10 is a good one."""
    steps: int = 2
    """Steps in one trace.  A step of a large model is tens of megabytes."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks of the job that do it, a list or one."""


@dataclass(frozen=True)
class GPTArguments:
    """Keys of `model` that are arguments of megatron-core's GPTModel, not of its TransformerConfig; same names, same defaults."""

    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    """Share of the head's channels that is rotated, in (0, 1]."""
    rope_scaling: bool = False
    """Llama 3's scaling of the rotary frequencies."""
    rope_scaling_factor: float = 8.0
    seq_len_interpolation_factor: float | None = None
    share_embeddings_and_output_weights: bool = False
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this and of parallel.tensor (Megatron-LM's argument); the loss masks the padding."""


@dataclass(frozen=True)
class Config:
    """One run.  `load_config` makes it, checked; nothing changes it afterwards."""

    run_dir: str = ""
    """Everything the run writes; empty: runs/<name of the config file>."""
    seed: int = 1234
    """Of weights, data order, embedded data and dropout."""
    deterministic: bool = False
    """The same bits from every run of one layout on the same machines: sets what torch, cuBLAS, NCCL and Transformer Engine need (trainer/deterministic.py)
    and refuses what varies.  Slower on a GPU; on a CPU supervised runs are so anyway."""
    recipe: str = ""
    """The name of a published run (config/recipes.py), whose keys come right before those of the file or override that names it: the same file
    and later overrides go over them."""
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    loss: dict[str, Any] = field(default_factory=lambda: {"name": "sft"})
    """name: one of megatron_plugin.LOSSES, or your own as package.module.function; every other key is a parameter of that loss."""
    mu: MuConfig | None = None
    ramp: RampConfig | None = None
    rollout: RolloutConfig | None = None
    """On-policy training (config/rollout.py); left out: supervised training."""
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of megatron-core's TransformerConfig and of GPTArguments.  What is left out has megatron-core's own default, except that
    hidden_dropout and attention_dropout are 0."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    sources: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Not a key: where each key that was set comes from, {"train.steps": "configs/dft.yaml:9", "data.train": "command line"}."""

    @property
    def loss_name(self) -> str:
        return self.loss["name"]

    @property
    def role(self) -> LossRole:
        """How expert samples and rollouts enter a step with this loss."""
        return role_of(self.loss_name, expert_samples=self.data.expert_samples, has_mu=self.mu is not None)

    @property
    def loss_params(self) -> dict[str, Any]:
        """What `bind` takes beside the name."""
        return {key: value for key, value in self.loss.items() if key != "name"}

    @property
    def gpt(self) -> GPTArguments:
        names = {f.name for f in fields(GPTArguments)}
        return GPTArguments(**{key: value for key, value in self.model.items() if key in names})

    @property
    def transformer(self) -> dict[str, Any]:
        """Keyword arguments of TransformerConfig, as plain values: activation_func is a name."""
        names = {f.name for f in fields(GPTArguments)}
        return {key: value for key, value in self.model.items() if key not in names}

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel ranks."""
        return world_size // (self.parallel.tensor * self.parallel.pipeline * self.parallel.context)

    def num_micro_batches(self, world_size: int) -> int:
        """Micro-batches of one step on one rank."""
        return self.train.global_batch // (self.train.micro_batch * self.data_parallel(world_size))
