"""The process that judges answers: samples as lines of JSON on stdin, verdicts as lines on stdout.  worker_pool.py starts it.

It sets itself an alarm for each answer, which ends it in C code too and when the parent is gone, limits its own memory, and leaves the network.
Imports nothing but the standard library until it knows its task, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_plugin.rollout.no_network import leave_network

__all__ = ["Verdict", "main"]


class Verdict(NamedTuple):
    reward: Any
    """A number; of a user's function that returned something else, {"type", "value"}: the parent raises."""
    cause: str
    """right, wrong, no answer, no reference, format, scored (by a user's function), timeout, memory, crash, error"""
    detail: str = ""


def main() -> None:
    """Tasks and samples as lines on stdin, verdicts as lines on what was stdout."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of a judge must not get between the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, lines = os.getppid(), sys.stdin.buffer

    def reply(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    task = json.loads(lines.readline())
    network_kept = "" if task["network"] else leave_network()  # before anything of the judge's is imported
    try:
        judge = _judge_of(task)
    except Exception as error:
        reply({"failed": str(error)})
        return
    _limit_memory(task["memory_mb"])
    reply({"ready": True, "network_kept": network_kept})
    while line := _next_line(lines, parent):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever code it is in
        signal.setitimer(signal.ITIMER_REAL, task["timeout_s"])
        try:
            reward, cause, detail = judge(json.loads(line)), "scored", ""
            if isinstance(reward, Verdict):
                reward, cause, detail = reward
            json.dumps(reward)
        except MemoryError:
            reward, cause, detail = 0.0, "memory", f"more than {task['memory_mb']} MiB"
        except BaseException as error:  # SystemExit too
            reward, cause, detail = 0.0, "error", f"{type(error).__name__}: {error}"[:500] + (_place(error) if task["kind"] == "user" else "")
            if isinstance(error, OSError) and not task["network"]:
                detail += " (a reward has no network unless rollout.reward_network is true)"
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply({"reward": reward, "cause": cause, "detail": detail})


def _place(error: BaseException) -> str:
    """" (file:line)": where in the user's own file it was raised, or called what raised it."""
    import traceback

    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def _next_line(lines, parent: int) -> bytes:
    """The next sample; empty at the end, or when the parent is gone but some process it forked still holds the pipe open."""
    while not select.select([lines], [], [], 5.0)[0]:
        if os.getppid() != parent:
            return b""
    return lines.readline()


def _limit_memory(memory_mb: int) -> None:
    """RLIMIT_AS: what the imports took, which is no answer's fault, and memory_mb."""
    import resource

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory_mb * 2**20, now + memory_mb * 2**20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _judge_of(task: Mapping[str, Any]):
    """The function sample -> Verdict, or -> reward, of a task."""
    if task["kind"] == "math":
        return _math_judge()
    if task["kind"] == "format":
        return _format_judge(task["pattern"], task["full"])
    return _user_judge(task["path"])


def _format_judge(pattern: str, full: bool):
    import re

    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the format pattern {pattern!r} is no regular expression: {error}") from None
    match = compiled.fullmatch if full else compiled.search
    return lambda sample: Verdict(1.0, "right") if match(sample["completion"]) else Verdict(0.0, "format")


def _math_judge():
    """math-verify's judgement of the completion against the reference.  Its own alarms are off: ours end C code too."""
    import logging

    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ValueError(f"reward 'math' needs the package math-verify ({error}): pip install 'math-verify[antlr4_13_2]', or use 'numeric'") from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def tolerant(function, *args, **options) -> Any:
        """First so that a MemoryError shows; then, after any other error, as math-verify goes on: the next way to read or compare is tried."""
        try:
            return function(*args, **options, raise_on_error=True)
        except MemoryError:
            raise
        except Exception:
            return function(*args, **options, raise_on_error=False)

    def judge(sample: Mapping[str, Any]) -> Verdict:
        expected = tolerant(parse, _as_latex(sample["reference"]), parsing_timeout=None)
        if not expected:
            return Verdict(0.0, "no reference", f"math-verify reads nothing in {sample['reference'][:80]!r}")
        got = tolerant(parse, sample["completion"], parsing_timeout=None)
        if not got:
            return Verdict(0.0, "no answer")
        return Verdict(1.0, "right") if tolerant(verify, expected, got, timeout_seconds=None) else Verdict(0.0, "wrong")

    judge({"reference": "1", "completion": "$1$"})  # its grammar and patterns are built at the first use: 0.2 s, against 2 ms at the second
    return judge


def _as_latex(reference: str) -> str:
    """A reference as math-verify reads it: what follows GSM8K's mark, and bare formulae between dollars.

    Left as they are, "\\boxed{3} boxes of 2, #### 6" is read as 3, 2\\pi as 2 and \\{1,2\\} as nothing (math-verify 0.9.0).
    """
    reference = reference.rpartition("####")[2].strip()
    delimited = any(mark in reference for mark in ("$", "\\boxed", "\\(", "\\["))
    return reference if delimited else f"${reference}$"


def _user_judge(path: str):
    """The function 'package.module.function', called with prompt, completion, reference and finish_reason as keywords."""
    import difflib
    import inspect
    from importlib import import_module

    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"reward '{path}': cannot import '{module_name}' ({type(error).__name__}: {error}); expected 'package.module.function' with the package "
            "on the Python path"
        ) from None
    if not callable(function := getattr(module, name, None)):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=1)
        raise ValueError(f"reward '{path}': module '{module_name}' has no function '{name}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
    try:
        inspect.signature(function).bind(prompt="", completion="", reference="", finish_reason="")
    except TypeError as error:
        takes = inspect.signature(function)
        raise ValueError(
            f"reward '{path}' takes {takes} ({error}); a reward is called with the keywords prompt, completion, reference and finish_reason: "
            "add **_ for those it does not need"
        ) from None

    def judge(sample: Mapping[str, Any]) -> Any:
        value = function(**sample)
        value = value.item() if hasattr(value, "item") else value  # NumPy's and torch's numbers
        return float(value) if isinstance(value, (bool, int, float)) else {"type": type(value).__name__, "value": repr(value)[:80]}

    return judge


if __name__ == "__main__":
    main()
