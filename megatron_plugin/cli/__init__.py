"""The command `megatron-plugin`, and what torchrun starts:

    torchrun --nproc-per-node 4 -m megatron_plugin.cli train configs/dft.yaml parallel.tensor=2 data.train=x.jsonl

Nothing heavy is imported before the arguments and the configuration are known to be right.  Exit codes: 0 done, 2 configuration, 3 no
usable checkpoint, 4 data, 5 no rollouts (engines or rewards failed for good), 12 out of memory, 17 loss or gradient not a number too often, 130 Ctrl-C,
143 SIGTERM (training saves its last step before either), 1 anything else.  An exception with an attribute `exit_code` is the person's to mend: one message, no
traceback.  (torchrun itself exits with 1 whatever its ranks exit with, and prints theirs.)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from megatron_plugin.cli.arguments import arranged
from megatron_plugin.cli.commands import parser
from megatron_plugin.cli.spawned import end_with_parent, is_spawned
from megatron_plugin.trainer.lost_peer import is_lost_peer

__all__ = ["main"]

if is_spawned():  # by the console script; with -m it is __main__.py
    end_with_parent()

# Seconds a rank waits before it speaks about an error that every rank is likely to have met.  torchrun ends it meanwhile, because rank 0
# has spoken and exited; if not, the error is this rank's alone, or this is another node.  With the 30 s torchrun gives the ranks it ends,
# that stays below a minute.
WAIT_LOCAL_ZERO, WAIT_OTHERS = 5.0, 10.0
WAIT_LOST_PEER = 3.0  # its cause may be about to be reported
STOPPED = (130, 143)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a SystemExit of the command itself goes through."""
    try:
        arguments = parser().parse_args(arranged(sys.argv[1:] if argv is None else argv))
        arguments.run(arguments)
        return 0
    except KeyboardInterrupt:
        return _leave(130, KeyboardInterrupt("interrupted by Ctrl-C"))
    except Exception as error:
        return _leave(_exit_code(error), error)


def _exit_code(error: BaseException) -> int | None:
    """The code an error asks for; None for one that is not the person's to mend."""
    code = getattr(error, "exit_code", None)
    return code if isinstance(code, int) else None


def _leave(code: int | None, error: BaseException) -> int:
    """Says what happened, once per job, and returns the exit code (under torchrun: ends the process with it)."""
    expected = code is not None
    code = 1 if code is None else code
    stopped = code in STOPPED  # every rank was, and says nothing that rank 0 does not say
    text = f"megatron-plugin: {'' if stopped else 'error: '}{error}" if expected else "".join(traceback.format_exception(error)).rstrip()
    if "RANK" not in os.environ:
        print(text, file=sys.stderr)
        return code
    # A handler of the trainer (preemption) must not keep alive a rank that is only waiting to be ended.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank = os.environ["RANK"]
    first = rank == "0" if stopped else _is_first(expected, error)
    if first:
        print(text if expected and rank == "0" else f"rank {rank}: {text}", file=sys.stderr, flush=True)
        if not stopped:
            _tell_torchrun(text)
    elif not expected:
        print(f"rank {rank}: failed after another rank, with {type(error).__name__}", file=sys.stderr, flush=True)
        # Had we exited before the first rank, torchrun might name us as the root cause.  It ends us as soon as that one has exited.
        time.sleep(WAIT_OTHERS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: leaving a process group whose other members hang can hang too, in its destructor


def _is_first(expected: bool, error: BaseException) -> bool:
    """Whether this rank is the one that speaks; waits where another is likelier to know more."""
    if expected and os.environ["RANK"] != "0":
        time.sleep(WAIT_LOCAL_ZERO if os.environ.get("LOCAL_RANK") == "0" else WAIT_OTHERS)
    elif not expected and is_lost_peer(error):
        time.sleep(WAIT_LOST_PEER)
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return not own or not any(path != Path(own) for path in Path(own).parent.parent.glob("*/error.json"))


def _tell_torchrun(text: str) -> None:
    """torchrun prints the earliest of these files as "Root Cause" when it ends: the first traceback is also the last thing on the terminal.

    The format of torch.distributed.elastic.multiprocessing.errors.ErrorHandler, written here because importing torch takes seconds."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own:
        return
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
    try:
        temporary = Path(f"{own}.tmp")
        temporary.write_text(json.dumps({"message": message}))
        temporary.replace(own)  # complete or not there: a torn file makes torchrun itself fail
    except OSError as error:
        print(f"cannot write {own}: {error.strerror}", file=sys.stderr)
