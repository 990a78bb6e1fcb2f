"""What the rank processes of test_scorer.py, test_onpolicy_steps.py and one of test_rollouts.py run: scores and optimizer steps, over the engines of rollout_ranks.py."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch

from megatron_plugin.data import IGNORE_INDEX, RowOrder, Sample
from megatron_plugin.trainer import engines
from megatron_plugin.trainer.mixed import mix, score
from megatron_plugin.trainer.onpolicy import OnPolicy
from megatron_plugin.trainer.run import start
from megatron_plugin.trainer.scorer import Scorer
from megatron_plugin.trainer.sources import is_expert
from tests.trainer.rollout_ranks import config_of, on_policy, one_world, outcome, warnings


def _rollout(tokens: list[int], advantage: float, number: int) -> Sample:
    tokens_T = torch.tensor(tokens)
    labels_T = torch.where(torch.arange(len(tokens)) >= 2, tokens_T, IGNORE_INDEX)
    live = (labels_T != IGNORE_INDEX).float()
    columns = {"expert": torch.zeros(len(tokens)), "advantage": advantage * live, "rollout_logp": torch.zeros(len(tokens))}
    return Sample(tokens_T, labels_T, live, f"rollout:{number}", columns)


def corrected(group, *, overrides: dict, log_ratios: list[list[float]], advantages: list[list[float]]) -> tuple[list[float], float]:
    """(weights of this rank's completions, corrected_frac): completions of four trained tokens whose summed log p_old - log p_rollout is `log_ratios`, and
    a demonstration."""
    config = config_of(group, overrides)
    with one_world(config):
        run = start(config)
        rank = group.rank()
        samples = [_rollout([5 + i, 6, 7, 8, 9, 10], a, i) for i, a in enumerate(advantages[rank])]
        logps = [found.logp_T for found in score(config, run.chunks, run.handle, mix(config, samples))]
        for i, (sample, logp_T, log_ratio) in enumerate(zip(samples, logps, log_ratios[rank], strict=True)):
            rolled_T = torch.where(sample.labels_T != IGNORE_INDEX, logp_T - log_ratio / 4, 0.0)
            samples[i] = replace(sample, columns={**sample.columns, "rollout_logp": rolled_T})
        expert = replace(_rollout([5, 6, 7, 8], 0.0, 9), columns={"expert": torch.ones(4), "advantage": torch.zeros(4)}, weight_T=torch.full((4,), 2.0))
        scorer = Scorer(run)
        part, = scorer.score([mix(config, [*samples, expert])], several=False)
        weights = [sample.weight_T[sample.labels_T != IGNORE_INDEX].unique().tolist() for sample in part.samples]
        assert all(len(w) == 1 for w in weights), "one weight for a whole sequence"
        return [w for w, in weights], scorer.metrics["rollout/corrected_frac"]


def columns_of_a_batch(group, *, overrides: dict, updates: list[int]) -> dict:
    """By rollout.updates: the columns of each part, and how far old_logp is from the log-probabilities before the first step."""
    found = {}
    for several in updates:
        with on_policy(group, overrides | {"rollout.updates": several, "run_dir": f"{overrides['run_dir']}{several}"}) as source:
            parts = source._batch(with_rollouts=True)
            before = [[x.logp_T for x in score(source.run.config, source.run.chunks, source.run.handle, part)] for part in parts]
            columns = [part.rows.columns for part in parts]
            apart = [
                float((sample.columns["old_logp"] - logp_T).abs().max())
                for part, logps in zip(parts, before, strict=True) for sample, logp_T in zip(part.samples, logps, strict=True) if "old_logp" in sample.columns
            ]  # fmt: skip
            found[several] = columns, apart
    return found


def reference(group, *, overrides: dict) -> dict:
    """Two steps with a reference; of the second batch ref_logp against log-probabilities at the start, and against those now."""
    with on_policy(group, overrides) as source:
        run = source.run
        first = {name: p.detach().clone() for name, p in run.chunks[0].module.named_parameters()}
        source.step()
        part, = source._batch(with_rollouts=True)
        now = [x.logp_T for x in score(run.config, run.chunks, run.handle, part)]
        with torch.no_grad():
            for name, p in run.chunks[0].module.named_parameters():
                p.copy_(first[name])
        start_ = [x.logp_T for x in score(run.config, run.chunks, run.handle, part)]
        columns = [sample.columns["ref_logp"] for sample in part.samples]
        return {name: max(float((a - b).abs().max()) for a, b in zip(columns, other, strict=True)) for name, other in (("start", start_), ("now", now))}


def resumes_supervised(group, *, overrides: dict) -> tuple[tuple[str, str], int]:
    """(what the trainer says of the position that supervised training leaves, engines started)."""
    config, started = config_of(group, overrides), []
    with one_world(config), patch.object(engines, "start_engine", started.append):
        run = start(config)
        run.position = RowOrder(4, 2, 1).state_dict() | {"guard": {}}
        return outcome(lambda: OnPolicy(run))[:2], len(started)


def between_updates(group, *, overrides: dict) -> list[list[str]]:
    """What is said when the position between two updates of a batch is saved: by whoever keeps the best, and after a signal."""
    with on_policy(group, overrides | {"rollout.updates": 2}) as source:
        source.step()
        found = []
        for source.guard.signal in (0, 15):
            with warnings() as said:
                source.position()
            found.append(list(said))
        return found


def steps(group, *, overrides: dict, count: int, right: str = "first", faults: dict | None = None) -> dict:
    """`count` steps: of each the means, or what it raised; the experts and rollouts among the samples that were pending; the prompts engines were asked."""
    with on_policy(group, overrides, right=lambda number, index: index == 0, faults=faults) as source:
        found: dict = {"means": [], "raised": [], "pending": []}

        def step() -> None:
            if not source.pending:
                source.pending = source._batch(with_rollouts=bool(source.sources(source.run.step)[1].share))
                found["pending"] += [[is_expert(sample) for sample in part.samples] for part in source.pending]
            found["means"].append(source.step())

        found["raised"] += [outcome(step)[:2] for _ in range(count)]
        return found | {"asked": sum(len(fake.prompts) for fake in source.fakes), "prompts": source.position()["prompts"]["consumed"]}


def lost_between(group, *, overrides: dict) -> dict:
    """An evaluation and a rollout batch at the same step; in between the server is late for longer than the fleet waits, and is taken for dead."""
    with on_policy(group, overrides) as source:
        rollouts, (server,) = source.rollouts, source.fakes
        rollouts.evaluate()
        rollouts.engines.fleet.mark_lost(server, "late")
        groups, _ = rollouts.batch()
        return {"answers": [len(g.judged.completions) for g in groups], "sent": server.sent, "restarts": server.restarts}
