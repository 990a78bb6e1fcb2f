"""What tests of one kind share: those with a real vLLM, those of a fleet of fakes, those of rewards.  They leave nothing behind."""

from pathlib import Path

import pytest

from megatron_plugin.rollout import slots
from megatron_plugin.rollout.fleet import Fleet
from megatron_plugin.rollout.rewards import make_reward
from tests.rollout.fake_engine import TIMEOUT_S

SHARED = Path("/dev/shm")


def shared_files() -> set[str]:
    """Ours and vLLM's in shared memory."""
    return {p.name for p in SHARED.iterdir() if p.name.startswith(("megatron-plugin-", "psm_"))}


@pytest.fixture
def fleet_of(monkeypatch):
    """A fleet of these fake engines, which is asked again after a twentieth of the time; whatever hangs is let go at the end."""
    monkeypatch.setattr(slots, "BACKOFF_S", 0.05)
    made = []

    def make(*engines, timeout_s=TIMEOUT_S, **options):
        made.extend(engines)
        return Fleet(engines, timeout_s=timeout_s, **options)

    yield make
    for engine in made:
        engine.release.set()


@pytest.fixture
def reward_of():
    """make_reward, and every one is closed at the end."""
    made = []

    def build(spec, **options):
        made.append(make_reward(spec, **{"timeout_s": 30, "workers": 1, **options}))
        return made[-1]

    yield build
    for reward in made:
        reward.close()
