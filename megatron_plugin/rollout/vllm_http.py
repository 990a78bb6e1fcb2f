"""A vLLM server as a rollout engine, over HTTP: the same code for our own child process and for a server somewhere else.

    engine = start_engine(EngineOptions(model_dir="model"))                                  # a child process
    engine = connect_engine("http://10.0.0.7:8000", expected=describe_model("model"))        # refused when it serves another model

Requests go to exactly the URL named: no redirect is followed, no proxy of the environment is used.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from megatron_plugin.rollout.engine import Completion, EngineError, EngineLostError, Health, SamplingParams, WrongModelError
from megatron_plugin.rollout.lease import LEASE_S
from megatron_plugin.rollout.vllm_answer import OtherWeightsError, choices_of, completion_of, most_bytes
from megatron_plugin.rollout.vllm_model import ModelDescription, describe_model
from megatron_plugin.rollout.vllm_process import SAY_S, EngineOptions, ServerProcess, start_server
from megatron_plugin.rollout.vllm_versions import check_vllm
from megatron_plugin.rollout.vllm_wire import CONNECT_S, Wire

__all__ = ["VLLMEngine", "connect_engine", "start_engine"]

log = logging.getLogger("megatron_plugin")
RELEASE_S = 2.0  # of giving a server back at the end

Engine = TypeVar("Engine", bound="VLLMEngine")


def start_engine(options: EngineOptions, kind: type[Engine] | None = None) -> Engine:
    """Start a child process and return it as a `kind` of VLLMEngine, STALE.  restart() starts it anew, close() ends it.

    EngineLostError when it does not come up."""
    process = start_server(options)
    try:
        return (kind or VLLMEngine)(process.url, describe_model(options.model_dir), process=process, options=options)
    except BaseException:
        process.stop()
        raise


def connect_engine(url: str, expected: ModelDescription, *, start_timeout_s: float = 300.0, owner: str = "") -> VLLMEngine:
    """A running server (`megatron-plugin serve`), STALE until we have sent it weights.

    owner: who sends it weights, the same after a restart; "": nobody in particular, who is neither refused nor keeps others away.
    WrongModelError when it serves something else than `expected`; EngineLostError when nothing answers within start_timeout_s; EngineError while
    another owner has it (lease.py)."""
    engine = VLLMEngine(url.rstrip("/"), expected, start_timeout_s=start_timeout_s, owner=owner)
    try:
        engine.claim()
    except BaseException:
        engine.close()
        raise
    return engine


class VLLMEngine:
    """See RolloutEngine.  One HTTP request per prompt; from several threads at once."""

    def __init__(
        self,
        url: str,
        expected: ModelDescription,
        *,
        process: ServerProcess | None = None,
        options: EngineOptions | None = None,
        start_timeout_s: float = 300.0,
        owner: str = "",
    ):
        self.owner = owner
        self.expected = expected
        self.process = process
        self.options = options
        self.start_timeout_s = options.start_timeout_s if options else start_timeout_s
        self.weight_version: int | None = None
        self._server_version = -1
        """Newest version the server said it has, ours or not."""
        self._updating: int | None = None
        self._asleep = False
        self._connect(url)

    @property
    def newest_version(self) -> int:
        """Newest weight version the server has had, ours or not; -1: none."""
        return max(self._server_version, -1 if self.weight_version is None else self.weight_version)

    # -- generating -------------------------------------------------------------------------------------------------------------------------------

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, *, timeout_s: float) -> list[Completion]:
        version = self.weight_version
        if version is None:
            raise EngineError(f"{self.name}: STALE, its weights are not those of the trainer: send_weights first")
        if self._asleep:
            raise EngineError(f"{self.name}: asleep: call wake() first")
        if not 0 < len(prompt_ids) < self.max_model_len:
            raise EngineError(
                f"{self.name}: got a prompt of {len(prompt_ids)} tokens, expected 1 to {self.max_model_len - 1}: the context holds "
                f"{self.max_model_len} tokens, prompt and completion together; leave the prompt out or serve a longer context"
            )
        stray = next((token for token in prompt_ids if not 0 <= token < self.vocab_size), None)
        if stray is not None:  # vLLM does not look without a tokenizer: the engine dies of it, and so would each one that the prompt is tried on
            raise EngineError(
                f"{self.name}: got token {stray} in a prompt, expected ids in [0, {self.vocab_size}): was it tokenized with another tokenizer?"
            )
        room = self.max_model_len - len(prompt_ids)
        body = {"token_ids": list(prompt_ids), "sampling_params": self._sampling(params, room)}
        answer = self._wire.ask("/inference/v1/generate", body, timeout_s, most_bytes=most_bytes(params))
        return [self._completion(choice, params, version) for choice in choices_of(answer, params.n, self.name)]

    def _sampling(self, params: SamplingParams, room: int) -> dict[str, Any]:
        """vLLM's sampling parameters: all that matter, so that no default of the server's decides."""
        return {
            "n": params.n,
            "max_tokens": min(params.max_tokens, room),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": None if params.seed is None else _spread(params.seed),
            "stop_token_ids": sorted({*params.stop_token_ids, *self._ends}),
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }

    def _completion(self, choice: Mapping[str, Any], params: SamplingParams, version: int) -> Completion:
        """EngineError for an answer whose tokens, log-probabilities or versions are not what was asked for."""
        try:
            return completion_of(choice, params, version=version, vocab_size=self.vocab_size, engine=self.name)
        except OtherWeightsError:
            if self.weight_version == version:  # else an update of our own came between
                self.weight_version = None
            raise

    # -- weights ----------------------------------------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Say that the server is ours, still.  EngineError when another trainer has it."""
        taken = next(filter(None, self._wire.call("megatron_plugin_claim", self.owner)), None) if self.owner else None
        if taken:
            raise EngineError(
                f"{self.name}: got a server that {taken['owner']} sends weights to, last {taken['seen_s']:.0f} s ago, expected one of this run's own: each "
                f"trainer needs its own server; if that one has ended, restart the server or wait until it was silent for {LEASE_S:.0f} s"
            )

    def begin_update(self, version: int) -> None:
        self.claim()
        self._server_version = max(self._server_version, self._read_version())
        if version <= (newest := self.newest_version):
            raise WrongModelError(
                f"{self.name}: got weight version {version}, expected one above {newest}, which it has: versions only go up; "
                "another trainer sends it weights, too (each needs a server of its own), or this one was set back: then restart the server"
            )
        if self._asleep:
            self.wake()
        if self.process is not None:
            self.process.cap_log()
        self.weight_version = None
        self._updating = version
        # running requests end with the weights they began with; an engine whose requests take longer than CONTROL_S (120 s) counts as lost, which
        # the trainer never sees: it updates when none are running
        self._wire.request("POST", "/pause", params={"mode": "wait", "clear_cache": False})
        self._wire.call("megatron_plugin_abort_update")  # of a trainer that died in the middle of one
        self._wire.request("POST", "/start_weight_update")

    def init_transfer(self, invitation: Mapping[str, Any]) -> None:
        """Let the workers join a transport's group; blocks until the trainer is there."""
        self._wire.request("POST", "/init_weight_transfer_engine", json={"init_info": dict(invitation)})

    def push(self, update_info: Mapping[str, Any]) -> None:
        self._check_updating()
        self._wire.request("POST", "/update_weights", json={"update_info": dict(update_info)})

    def finish_update(self) -> None:
        version = self._check_updating()
        self._wire.request("POST", "/finish_weight_update", json={"weight_version": str(version)})
        self._server_version = version
        # nothing in vLLM's update does it, and keys and values of the old weights would be taken for those of the new ones
        if not self._wire.read("POST", "/reset_prefix_cache", "success"):
            raise EngineError(f"{self.name}: the prefix cache could not be emptied: blocks are still held by running requests")
        if (found := self._read_version()) != version:
            raise EngineError(f"{self.name}: got weight version {found} after the update, expected {version}: is it updated by someone else, too?")
        self._wire.request("POST", "/resume")
        self._updating = None
        self.weight_version = version

    def abort_update(self) -> None:
        """Forget an update that was begun, if one was.  The engine stays STALE and paused until the next one."""
        if self._updating is not None:
            self._updating = None
            self._wire.call("megatron_plugin_abort_update")

    def _check_updating(self) -> int:
        if self._updating is None:
            raise EngineError(f"{self.name}: no update was begun: call begin_update first")
        return self._updating

    # -- state ------------------------------------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        # vLLM's default empties the cache: every running request would be pushed out and computed again
        self._wire.request("POST", "/pause", params={"mode": "keep", "clear_cache": False})

    def resume(self) -> None:
        self._wire.request("POST", "/resume")

    def sleep(self, level: int = 1) -> None:
        self._wire.request("POST", "/sleep", params={"level": level, "mode": "wait"})
        self._asleep = True
        if level > 1:
            self.weight_version = None

    def wake(self) -> None:
        self._wire.request("POST", "/wake_up")
        self._asleep = False

    def health(self) -> Health:
        if self.process is not None and not self.process.alive():
            return Health.DEAD
        said = self._wire.health()
        return Health.STALE if said is Health.HEALTHY and self.weight_version is None else said

    def restart(self) -> None:
        self.weight_version = self._updating = None
        self._wire.close()
        if self.process is None:
            self._connect(self.name)
            return
        self.process.stop()
        self.process = start_server(self.options)
        self._connect(self.process.url)

    def close(self) -> None:
        self.weight_version = self._updating = None
        if self.owner:
            try:
                body = {"method": "megatron_plugin_release", "args": [self.owner]}
                self._wire.request("POST", "/collective_rpc", RELEASE_S, json=body)
            except EngineError:  # it is gone, or hangs: the lease ends by itself
                pass
        self._wire.close()
        if self.process is not None:
            self.process.stop()

    # -- connecting -------------------------------------------------------------------------------------------------------------------------------

    def _connect(self, url: str) -> None:
        """Wait until the server at `url` answers, and see that it serves what is expected."""
        self.name = url
        self._wire = Wire(url)
        self._asleep = False
        begin, said = time.monotonic(), -math.inf
        while True:
            try:
                self._wire.request("GET", "/health", CONNECT_S)
                break
            except EngineLostError as error:
                now = time.monotonic()
                if self.process is not None or now > begin + self.start_timeout_s:
                    raise
                if now > said + SAY_S:
                    said = now
                    log.warning("waiting for rollout server %s, %.0f of %.0f s: %s", url, now - begin, self.start_timeout_s, error)
                time.sleep(0.5)
        self._check_model()

    def _check_model(self) -> None:
        try:
            found = self._wire.call("megatron_plugin_describe")[0]
        except EngineLostError:
            raise
        except EngineError as error:
            raise EngineError(f"{error}: it does not say what it serves: was it started by 'megatron-plugin serve'?") from error
        try:
            check_vllm(found["vllm"])
            if self.process is not None and found["engine_id"] != self.process.engine_id:
                raise EngineLostError(f"{self.name}: another server took the port that was free; start again")
            self.expected.check(found, self.name)
            self.max_model_len: int = found["max_model_len"]
            self.vocab_size: int = found["vocab_size"]
            self.workers: int = found["workers"]
            self.backend: str = found["backend"]
            self._ends: list[int] = found["end_token_ids"]
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"{self.name}: got a description without {error}, expected that of 'megatron-plugin serve' of this version") from error
        self._server_version = self._read_version()

    def _read_version(self) -> int:
        """-1 for a server whose weights no trainer has ever set."""
        version = self._wire.read("GET", "/weight_info", "weight_version")
        return int(version) if str(version).isdigit() else -1


def _spread(seed: int) -> int:
    """A seed far from those of its neighbours: vLLM draws completion i of a request with seed + i, so 7 and 8 would share all but one."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=7).digest(), "big")
