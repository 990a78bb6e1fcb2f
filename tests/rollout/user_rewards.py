"""Rewards as a user writes them, good and bad, for make_reward by dotted path.  They run in a worker process."""

import os
import signal
import socket
import sys
import time


def length(*, completion, **_):
    return len(completion)


def all_fields(prompt, completion, reference, finish_reason):
    return float((prompt, completion, reference, finish_reason) == ("p", "c", "r", "length"))


def prints(*, completion, **_):
    print('{"reward": 99.0, "cause": "right", "detail": ""}', flush=True)
    os.write(1, b"and past Python\n")
    return True


def in_an_array(**_):
    import numpy as np  # here, or every restart of a worker would take longer

    return np.float32(0.25)


def by_word(*, completion, **_):
    """One kind of trouble per word."""
    if completion == "sleep":
        time.sleep(600)
    if completion == "deaf":  # neither our alarm nor a polite end reaches it
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if completion == "child":
        os.system("sleep 601 & echo $! > $REWARD_CHILD_PID; sleep 600")
    if completion == "memory":
        return len(bytearray(2**30))
    if completion == "late leak":
        time.sleep(0.2)
    if completion.endswith("leak"):
        KEPT.append(bytes(60 * 2**20))  # reserved, not written
    if completion == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "exit":
        sys.exit("no more")
    if completion == "raise":
        raise KeyError("answer")
    if completion == "leave":
        os._exit(0)
    if completion == "pid":
        return os.getpid()
    return 1.0


KEPT = []


def always_raises(**_):
    raise FileNotFoundError("the model that judges is not there")


def returns(*, completion, **_):
    return {"nan": float("nan"), "inf": float("inf"), "text": "0.5", "none": None, "list": [1.0], "complex": 1j, "huge": 10**400}[completion]


async def asynchronous(**_):
    return 1.0


def two_arguments(prompts, completions):
    return 1.0


NOT_A_FUNCTION = 3


def connects(*, completion, **_):
    """To the address in the completion."""
    host, _, port = completion.partition(":")
    socket.create_connection((host, int(port)), timeout=5).close()
    return 1.0
