"""A rollout engine in memory, to make the failures happen that a real one shows once a month.  Tests of failures only."""

import threading

from megatron_plugin.rollout.engine import (
    Completion,
    EngineBusyError,
    EngineError,
    EngineLostError,
    Health,
    SamplingParams,
    WrongModelError,
)
from megatron_plugin.rollout.fleet import Request

TIMEOUT_S = 0.5  # of a request, where a test waits for it to pass
SOON_S = 5.0  # where the answer should come at once: two busy cores


class FakeEngine:
    """Follows engine.py's protocol; tokens are (version, a number of the prompt, 0, 1, ...), so that a test sees who was asked what.

    faults: number of a generate call (from 0) or a prompt -> what goes wrong there:
        die       EngineLostError at once, and DEAD from then on
        hang      never answers, and breaks its promise about timeout_s
        late      the same until `release` is set, then answers as if nothing had been
        refuse    EngineError: this prompt only
        stale     restarted by somebody else: EngineError, and STALE
        short     a completion less than asked
        old       completions of the version before
        nothing   returns None
        bug       KeyError
        other     WrongModelError
        busy      EngineBusyError: HTTP 503 of an engine that is well
        cut       EngineLostError, and the engine is well
        silent    EngineLostError, and no probe is answered until a restart
        empty     completions without tokens
    """

    def __init__(self, name="fake", *, version=1, faults=None, delay_s=0.0, restart_fails=0):
        self.name, self.weight_version, self.faults = name, version, dict(faults or {})
        self.delay_s, self.restart_fails = delay_s, restart_fails
        self.newest_version = -1 if version is None else version
        """That it was ever sent: a server that was only taken for dead still has it after restart()."""
        self.state = Health.HEALTHY if version is not None else Health.STALE
        self.release = threading.Event()
        self.prompts, self.in_flight, self.most_in_flight = [], 0, 0
        self.restarts, self.closes, self.said = 0, 0, []
        self._lock = threading.Lock()

    def generate(self, prompt_ids, params, *, timeout_s):
        with self._lock:
            number = len(self.prompts)
            self.prompts.append(tuple(prompt_ids))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.release.wait(self.delay_s)
            return self._answer(self.faults.get(number) or self.faults.get(tuple(prompt_ids)), prompt_ids, params)
        finally:
            with self._lock:
                self.in_flight -= 1

    def _answer(self, fault, prompt_ids, params):
        if self.state in (Health.DEAD, Health.SUSPECT):
            raise EngineLostError(f"{self.name}: connection refused")
        if self.state is Health.STALE:
            raise EngineError(f"{self.name} is stale")
        if fault == "die":
            self.state = Health.DEAD
            raise EngineLostError(f"{self.name}: connection reset")
        if fault in ("hang", "late"):
            self.release.wait(60)
        if fault == "hang":
            raise EngineLostError(f"{self.name} hung")
        if fault == "stale":
            self.state = Health.STALE
            raise EngineError(f"{self.name} has no weights")
        if fault == "refuse":
            raise EngineError(f"the prompt has {len(prompt_ids)} tokens, which leaves no room")
        if fault == "other":
            raise WrongModelError(f"{self.name} serves another model")
        if fault == "busy":
            raise EngineBusyError(f"{self.name}: HTTP 503: too many requests")
        if fault in ("cut", "silent"):
            self.state = Health.SUSPECT if fault == "silent" else self.state
            raise EngineLostError(f"{self.name}: the connection broke")
        if fault == "bug":
            raise KeyError("choices")
        if fault == "nothing":
            return None
        version = self.weight_version - (fault == "old")
        count = params.n - (fault == "short")
        return [_completion(version, () if fault == "empty" else (version, sum(prompt_ids), index)) for index in range(count)]

    def begin_update(self, version):
        if self.state is Health.DEAD:
            raise EngineLostError(f"{self.name}: connection refused")
        if version <= self.newest_version:
            raise WrongModelError(f"{self.name}: got version {version}, expected one above {self.newest_version}")
        self.state, self._coming = Health.STALE, version

    def push(self, update_info):
        self.said.append(("push", update_info))

    def finish_update(self):
        self.state, self.weight_version = Health.HEALTHY, self._coming
        self.newest_version = self._coming

    def pause(self):
        self._say("pause")

    def resume(self):
        self._say("resume")

    def sleep(self, level=1):
        self._say(f"sleep {level}")

    def wake(self):
        self._say("wake")

    def health(self):
        if self.faults.get("health") == "hang":
            self.release.wait(60)
        if self.faults.get("health") == "bug":
            raise ConnectionError("no route to host")
        return self.state

    def restart(self):
        self.restarts += 1
        if self.restarts <= self.restart_fails:
            raise EngineLostError(f"{self.name}: start {self.restarts} failed, out of memory")
        self.state, self.weight_version = Health.STALE, None

    def close(self):
        self.closes += 1
        if self.faults.get("close") == "bug":
            raise OSError("no such process")

    def _say(self, word):
        if self.faults.get(word) == "die":
            raise EngineLostError(f"{self.name}: connection reset")
        if self.faults.get(word) == "refuse":
            raise EngineError(f"{self.name} cannot {word}")
        self.said.append(word)


def _completion(version, token_ids):
    return Completion(token_ids, (-0.5,) * len(token_ids), "stop", version)


def update(engines, version):
    """A whole weight update."""
    for engine in engines:
        engine.begin_update(version)
        engine.push({"names": ["w"]})
        engine.finish_update()


def requests(count, *, n=2):
    """k0, k1, ...: of n completions each, every prompt with a sum of its own."""
    return [Request(f"k{i}", (i + 1, 7), SamplingParams(n=n, max_tokens=4)) for i in range(count)]


def keys_once(generated, count):
    """Asserts that each of `requests(count)` ended in exactly one place."""
    found = [*generated.completions, *generated.refused, *generated.missing]
    assert sorted(found) == sorted(f"k{i}" for i in range(count)), "a request was lost or ended in two places"


def answers_match(generated, version=1, n=2):
    """Asserts that each completion is of its own prompt and of these weights."""
    for key, completions in generated.completions.items():
        assert [c.token_ids for c in completions] == [(version, int(key[1:]) + 8, index) for index in range(n)], f"{key} got another's answer"
