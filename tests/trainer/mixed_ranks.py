"""What the rank processes of test_mixed.py and test_reference.py run: a small GPT built by the trainer, and samples of two sources."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_plugin import Head, attach, bind
from megatron_plugin.config import load_config
from megatron_plugin.data import BLANK_ROW, IGNORE_INDEX, DataError, Sample, pack_samples
from megatron_plugin.parallel.normaliser import Source
from megatron_plugin.trainer import checkpoint as checkpoints
from megatron_plugin.trainer import saving
from megatron_plugin.trainer.mixed import mix, score, train_mixed
from megatron_plugin.trainer.model import build_model, build_optimizer, transformer_config
from megatron_plugin.trainer.reference import Reference
from megatron_plugin.trainer.step import prepare_step, run_rows
from megatron_plugin.trainer.world import world
from tests.hooks.layout_ranks import _gather_shards, _gradients

VOCABULARY, LENGTH, MU = 37, 16, 0.3
SMALL = {
    "model.num_layers": 4, "model.hidden_size": 32, "model.ffn_hidden_size": 64, "model.make_vocab_size_divisible_by": 16,
    "data.seq_length": LENGTH, "train.global_batch": 16, "train.micro_batch": 1, "train.lr": 1e-2,
}  # fmt: skip
NAMES = ["lm loss", "nll", "entropy", "expert/phi", "rollout/clip_frac"]
# tokens, first trained place, expert; the last two rollouts are not trained at all
SHAPES = [(7, 3, 1), (5, 2, 0), (12, 4, 0), (3, 1, 1), (9, 8, 0), (16, 5, 1), (4, 2, 0), (11, 11, 0), (6, 6, 0)]


def samples() -> list[Sample]:
    """Nine samples, 3 of experts; unequal lengths, a data weight of 2 on one expert, columns that differ from token to token."""
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator)

    made = []
    for number, (length, first, expert) in enumerate(SHAPES):
        tokens = torch.randint(0, VOCABULARY, (length,), generator=generator)
        trained = torch.arange(length) >= first
        weight = trained.float() * (2.0 if number == 3 else 1.0)
        columns = {"advantage": draw(1).expand(length), "old_logp": -3.6 + 0.5 * draw(length), "rollout_logp": -3.6 + 0.5 * draw(length)}
        columns = {"expert": torch.ones(length)} if expert else {"expert": torch.zeros(length), **columns}
        made.append(Sample(tokens, torch.where(trained, tokens, IGNORE_INDEX), weight, f"sample:{number}", columns))
    return made


def _mine(everyone: list[Sample]) -> list[Sample]:
    """This data-parallel rank's: with two ranks, the second has the rollouts 1, 2 and an untrained one; with four, the last one has nothing."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if ranks == 1:
        return everyone
    second = [s for i, s in enumerate(everyone) if i in (1, 2, 7)]
    first = [s for i, s in enumerate(everyone) if i not in (1, 2, 7)]
    return [first, second, [], []][rank]


LOSSES = {"chord": bind("chord", preset="phi"), "grpo": bind("grpo"), "chord_phi": bind("chord_phi"), "sft": bind("sft")}
DENOMINATORS = {"token": {}, "sequence": {"denominator": "sequence"}, "constant": {"denominator": "constant", "constant": 8.0}}


class Built:
    """The trainer's model, optimizer and an attached loss on this rank, weights from `checkpoint`."""

    def __init__(self, config, *, checkpoint: Path | None = None, loss: str = "chord", one_pass: bool = True) -> None:
        self.config = config
        self.transformer = transformer_config(config)
        self.chunks = build_model(config, self.transformer, VOCABULARY)
        self.optimizer, self.scheduler = build_optimizer(config, self.transformer, self.chunks)
        if checkpoint is not None:
            checkpoints.load_checkpoint(checkpoint, self.chunks)
            self.optimizer.reload_model_params()
        self.handle = None
        self.attach(loss, one_pass=one_pass)

    def attach(self, loss: str, *, one_pass: bool = True) -> None:
        if self.handle is not None:
            self.handle.detach()
        self.handle = attach(self.chunks, LOSSES[loss], head=Head(vocab_size=VOCABULARY), one_pass=one_pass)

    def train(self, mixed, *, expert: Source, rollout: Source) -> dict[str, float]:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return train_mixed(self.config, self.chunks, self.handle, mixed, expert=expert, rollout=rollout, names=NAMES)

    def gradients(self) -> list:
        if self.config.parallel.distributed_optimizer:
            _gather_shards(self.chunks)
        return _gradients(self.chunks)


@contextlib.contextmanager
def built(group, overrides: dict, **options):
    config = load_config("configs/debug_cpu.yaml", [f"{k}={v}" for k, v in {**SMALL, **overrides}.items()], world_size=group.size())
    with contextlib.redirect_stdout(io.StringIO()), world(config):
        yield Built(config, **options)


def save(group, *, run_dir: str) -> Path:
    """A checkpoint of one rank with weights larger than at the start, so that probabilities differ; its path."""
    with built(group, {"run_dir": run_dir}) as run:
        generator = torch.Generator().manual_seed(5)
        for p in run.chunks[0].module.parameters():
            p.data.add_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() > 1 else 0.1))
        return saving.save_checkpoint(run_dir, run.chunks, None, {"step": 0}, keep=0)


def by_hand(group, *, run_dir: str, checkpoint: Path) -> dict:
    """Each source alone, each sample alone, from the logits that the model gives, with the formulae written out: {(source, denominator): gradients},
    "objective": {(source, denominator): value}, and "logp", "entropy" of every sample."""
    with built(group, {"run_dir": run_dir}, checkpoint=checkpoint) as run:
        run.handle.detach()
        found = {"objective": {}}
        for source in ("expert", "rollout"):
            mine = [s for s in samples() if bool(s.columns["expert"].any()) == (source == "expert")]
            for denominator in DENOMINATORS:
                run.chunks[0].zero_grad_buffer()
                value = _objective(run.chunks[0], mine, source, denominator)
                value.backward()
                found[source, denominator] = _gradients(run.chunks)
                found["objective"][source, denominator] = float(value)
        with torch.no_grad():
            rows = [_log_softmax(run.chunks[0], s) for s in samples()]
        found["logp"] = [_of_labels(row, s).where(_trained(s), 0.0) for row, s in zip(rows, samples(), strict=True)]
        found["entropy"] = [torch.cat((torch.zeros(1), -(row.exp() * row).sum(-1)[:-1])).where(_trained(s), 0.0)
                            for row, s in zip(rows, samples(), strict=True)]  # fmt: skip
        return found


def _trained(sample: Sample) -> torch.Tensor:
    return sample.labels_T != IGNORE_INDEX


def _log_softmax(model, sample: Sample) -> torch.Tensor:
    """[T, V]: row t is the distribution of token t + 1."""
    tokens = sample.tokens_T[None]
    return model(tokens, torch.arange(tokens.shape[1])[None], None)[0, :, :VOCABULARY].float().log_softmax(-1)


def _of_labels(rows: torch.Tensor, sample: Sample) -> torch.Tensor:
    """[T] log-probability of each token at its own place; the first has none."""
    return torch.cat((rows.new_zeros(1), rows[:-1].gather(1, sample.tokens_T[1:, None])[:, 0]))


def _objective(model, mine: list[Sample], source: str, denominator: str) -> torch.Tensor:
    """The mean over tokens, over sequences of token means, or Dr. GRPO's over 8 tokens a sequence; p(1-p) NLL of experts, PPO's clip of rollouts."""
    total, tokens, sequences = 0.0, 0, 0
    for sample in mine:
        trained = _trained(sample)
        if not trained.any():
            continue
        logp = _of_labels(_log_softmax(model, sample), sample)[trained]
        if source == "expert":
            p = logp.detach().exp()
            losses = -p * (1 - p) * logp
        else:
            ratio = (logp - sample.columns["old_logp"][trained]).exp()
            advantage = sample.columns["advantage"][trained]
            losses = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            losses = torch.where(advantage < 0, torch.minimum(losses, -3 * advantage), losses)
        losses = losses * sample.weight_T[trained]
        total = total + (losses.mean() if denominator == "sequence" else losses.sum())
        tokens, sequences = tokens + len(losses), sequences + 1
    return total / {"token": tokens, "sequence": sequences, "constant": 8.0 * sequences}[denominator]


def mixed_gradients(group, *, overrides: dict, checkpoint: Path, cases: list[tuple[str, str, bool]]) -> dict:
    """{(denominator of experts, of rollouts, one_pass): (means, gradients)} of one step; "scores": of this rank's samples, with their sources;
    "again": means of a step whose old and rollout log-probabilities are the scores."""
    with built(group, overrides, checkpoint=checkpoint) as run:
        mixed, found = mix(run.config, _mine(samples())), {}
        for expert, rollout, one_pass in cases:
            run.attach("chord", one_pass=one_pass)
            means = run.train(mixed, expert=Source(share=MU, **DENOMINATORS[expert]), rollout=Source(share=1 - MU, **DENOMINATORS[rollout]))
            found[expert, rollout, one_pass] = means, run.gradients()
        bare = mix(run.config, [replace(s, columns={}) for s in mixed.samples])
        scores = score(run.config, run.chunks, run.handle, bare)  # with chord attached, which wants columns
        found["scores"] = [(s.source, x.logp_T, x.entropy_T) for s, x in zip(mixed.samples, scores, strict=True)]
        for name in ("old_logp", "rollout_logp"):
            mixed = mixed.with_columns(name, [x.logp_T for x in scores])
        found["again"] = run.train(mixed, expert=Source(share=MU), rollout=Source(share=1 - MU))
        found["micro_batches"] = len(mixed.micro_batches)
        return found


def alone(group, *, overrides: dict, checkpoint: Path) -> dict[str, bool]:
    """Whether a source without a share leaves no bit behind: {"mu=0": chord's gradient is that of GRPO without expert samples, ...}."""
    with built(group, overrides, checkpoint=checkpoint) as run:
        mine, found = _mine(samples()), {}
        whole = mix(run.config, mine)
        for name, loss, share, expert in (("mu=0", "grpo", 0.0, False), ("mu=1", "chord_phi", 1.0, True)):
            run.attach("chord")
            means = run.train(whole, expert=Source(share=share), rollout=Source(share=1 - share))
            mixed = run.gradients()
            run.attach(loss)
            apart = mix(run.config, [s for s in mine if bool(s.columns["expert"].any()) == expert])
            other = run.train(apart, expert=Source(), rollout=Source())
            same = all(torch.equal(a, b) for (*_, a), (*_, b) in zip(mixed, run.gradients(), strict=True))
            found[name] = same and means["lm loss"] == other["lm loss"] and bool(sum(g.norm() for *_, g in mixed) > 0)
            found[f"{name}, other source"] = means["rollout_tokens" if expert else "expert_tokens"]
        return found


def divided_by_all(group, *, overrides: dict, checkpoint: Path) -> dict:
    """{"loss tokens", "all tokens": (means, gradients)} of a mixed step and of a supervised one, N being that of a mixture of experts the second
    time; "N": it, and what it should be.  The fields are set after the model is built: its own dispatchers do not run on a CPU."""
    with built(group, overrides, checkpoint=checkpoint) as run:
        mixed, found = mix(run.config, _mine(samples())), {}
        for name in ("loss tokens", "all tokens"):
            if name == "all tokens":
                run.transformer.num_moe_experts, run.transformer.moe_aux_loss_coeff = 2, 0.01
            run.attach("chord")
            found[name] = [(run.train(mixed, expert=Source(share=MU), rollout=Source(share=1 - MU)), run.gradients())]
            run.attach("sft")
            for chunk in run.chunks:
                chunk.zero_grad_buffer()
            rows = pack_samples(samples(), LENGTH, pad_id=0)
            order = [*range(len(rows)), *[BLANK_ROW] * (-len(rows) % 8)]
            found[name].append((run_rows(run.config, run.chunks, run.handle, rows, order, NAMES, train=True), run.gradients()))
        places = len(mixed.micro_batches) * run.config.train.micro_batch * LENGTH * parallel_state.get_data_parallel_world_size()
        found["N"] = prepare_step(run.chunks, mixed.batches()).divided_by, places
        return found


def held_out(group, *, overrides: dict, checkpoint: Path, loss: str, temperature: float) -> dict[str, float]:
    """Means of an evaluation of samples without any column."""
    with built(group, overrides, checkpoint=checkpoint) as run:
        run.handle.detach()
        run.handle = attach(run.chunks, LOSSES[loss], head=Head(vocab_size=VOCABULARY, temperature=temperature), one_pass=True)
        rows = pack_samples([replace(s, columns={}) for s in samples()], LENGTH, pad_id=0)
        order = [*range(len(rows)), *[BLANK_ROW] * (-len(rows) % 8)]
        return run_rows(run.config, run.chunks, run.handle, rows, order, NAMES, train=False)


def nobody_has_a_sample(group, *, overrides: dict) -> tuple[dict, int, list, float]:
    """(means, micro-batches, scores, largest gradient) of a step without samples."""
    with built(group, overrides) as run:
        mixed = mix(run.config, []).with_columns("advantage", []).with_columns("expert", [])
        means = run.train(mixed, expert=Source(share=MU), rollout=Source(share=1 - MU, denominator="sequence"))
        largest = max(float(g.abs().max()) for *_, g in run.gradients())
        return means, len(mixed.micro_batches), score(run.config, run.chunks, run.handle, mixed), largest


def with_reference(group, *, overrides: dict, checkpoint: Path) -> dict:
    """A model trained for a step and its reference: scores under both, what an error inside leaves, and three optimizer steps, with a reference
    swapped in and out between them and without; all as differences that must be 0."""
    found = {}
    with built(group, overrides, checkpoint=checkpoint) as run:
        mixed = mix(run.config, _mine(samples()))
        reference, first = Reference(run.chunks), _logps(run, mixed)
        _steps(run, mixed, 1)
        trained = _logps(run, mixed)
        with reference.swapped_in():
            inside = _logps(run, mixed)
        found["reference"], found["own"] = _difference(first, inside), _difference(trained, _logps(run, mixed))
        found["they differ"] = _difference(first, trained)
        found["error"] = _error_inside(run, mixed, reference)
        found["own after an error"] = _difference(trained, _logps(run, mixed))
        found["bytes"] = reference.bytes, sum(p.numel() * p.element_size() for c in run.chunks for p in c.parameters())
        found["seconds"] = len(reference.seconds), min(reference.seconds)
        _steps(run, mixed, 2, between=lambda: _swap_and_score(run, mixed, reference))
        undisturbed = Built(run.config, checkpoint=checkpoint)
        _steps(undisturbed, mixed, 3)
        both = zip(*([p.detach() for c in one.chunks for p in c.parameters()] for one in (run, undisturbed)), strict=True)
        found["steps"] = max(float((a - b).abs().max()) for a, b in both)
    return found


def _steps(run: Built, mixed, steps: int, between=lambda: None) -> None:
    for _ in range(steps):
        run.train(mixed, expert=Source(share=MU), rollout=Source(share=1 - MU))
        between()  # gradients wait in main_grad meanwhile
        run.optimizer.step()
        run.scheduler.step(increment=1)


def _swap_and_score(run: Built, mixed, reference: Reference) -> None:
    with reference.swapped_in():
        _logps(run, mixed)


def _logps(run: Built, mixed) -> list[torch.Tensor]:
    return [x.logp_T for x in score(run.config, run.chunks, run.handle, mixed)]


def _difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max((float((x - y).abs().max()) for x, y in zip(a, b, strict=True)), default=0.0)


def _error_inside(run: Built, mixed, reference: Reference) -> list[str]:
    """What a second swap inside, an error inside and a backward of a forward before the swap say."""
    said = []
    for inside in (lambda: reference.swapped_in().__enter__(), lambda: 1 / 0):
        try:
            with reference.swapped_in():
                inside()
        except (RuntimeError, ZeroDivisionError) as error:
            said.append(str(error))
    weight = next(p for p in run.chunks[0].parameters() if p.dim() == 2)
    loss = weight.square().sum()
    with reference.swapped_in():
        pass
    try:
        loss.backward()
    except RuntimeError as error:
        said.append(str(error))
    return said


def interrupted_exchange(group, *, overrides: dict, checkpoint: Path) -> tuple[str, float]:
    """(the error, what it left different) of an exchange that fails at the third tensor, on its way in."""
    with built(group, overrides, checkpoint=checkpoint) as run:
        reference = Reference(run.chunks)
        with torch.no_grad():
            for p in run.chunks[0].parameters():
                p.add_(1.0)
        before = [p.detach().clone() for p in run.chunks[0].parameters()]
        whole, reference._kept[2] = reference._kept[2], torch.zeros(1, 2, 3, 5, 7)
        try:
            with reference.swapped_in():
                raise AssertionError("not reached")
        except RuntimeError as error:
            said = str(error)
        reference._kept[2] = whole
        return said, _difference(before, [p.detach() for p in run.chunks[0].parameters()])


def too_long(group, *, overrides: dict) -> str:
    """What `mix` says where the second rank has a sample longer than a row."""
    with built(group, overrides) as run:
        mine = samples()[:2]
        if parallel_state.get_data_parallel_rank() == 1:
            long = torch.arange(LENGTH + 1)
            mine.append(Sample(long, long, torch.ones(LENGTH + 1), "long:1"))
        try:
            mix(run.config, mine)
        except DataError as error:
            return str(error)
