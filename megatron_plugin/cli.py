"""The command `megatron-plugin`, and what torchrun starts:

    torchrun --nproc-per-node 4 -m megatron_plugin.cli train configs/dft.yaml parallel.tensor=2 data.train=x.jsonl

Nothing heavy is imported before the arguments and the configuration are known to be right.  Exit codes: 0 done, 2 configuration, 3 no
usable checkpoint, 4 data, 5 no rollouts (engines or rewards failed for good), 17 loss or gradient not a number, 1 anything else.  An exception with an
attribute `exit_code` is the person's to mend: one message, no traceback.  (torchrun itself exits with 1 whatever its ranks exit with, and
prints theirs.)
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_plugin import __version__  # no torch behind it

__all__ = ["main"]

USAGE_ERROR = 2
# Seconds a rank waits before it speaks about an error that every rank is likely to have met.  torchrun ends it meanwhile, because rank 0
# has spoken and exited; if not, the error is this rank's alone, or this is another node.  With the 30 s torchrun gives the ranks it ends,
# that stays below a minute.
WAIT_LOCAL_ZERO, WAIT_OTHERS = 5.0, 10.0
WAIT_LOST_PEER = 3.0
# What gloo, NCCL and the store say when another rank is gone: consequences, whose cause may be about to be reported.
LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "DistBackendError", "DistNetworkError", "gloo/")


class UsageError(Exception):
    """The command line does not parse."""

    exit_code = USAGE_ERROR


class Parser(argparse.ArgumentParser):
    """argparse that raises, so that a usage error under torchrun is printed by one rank like every other."""

    def error(self, message: str) -> NoReturn:
        hint = "; overrides are written key=value without dashes, such as train.steps=20" if "unrecognized arguments: -" in message else ""
        raise UsageError(f"{message}{hint}\n{self.format_usage().rstrip()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a SystemExit of the command itself goes through."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _leave(_exit_code(error), error)


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-plugin",
        description="Fine-tune with weighted on-policy-SFT losses on megatron-core.",
        epilog="exit codes: 0 done, 2 configuration, 3 no usable checkpoint, 4 data, 5 no rollouts, 17 loss or gradient not a number, 1 anything else",
    )
    parser.add_argument("--version", action="version", version=f"megatron-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    text = "Fine-tune as a configuration says.  With more than one rank: torchrun --nproc-per-node N -m megatron_plugin.cli train ..."
    train = commands.add_parser("train", help="fine-tune as a configuration says", description=text)
    _add_config(train)
    train.set_defaults(run=_train)

    _add_conversions(commands)
    _add_serve(commands)
    config = commands.add_parser("config", help="look at a configuration", description="Look at a configuration.")
    actions = config.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=Parser)
    text = "Print the whole configuration as YAML, with the origin of what is not a default.  WORLD_SIZE=N checks it for N ranks."
    show = actions.add_parser("show", help="the resolved configuration, with where each value comes from", description=text)
    _add_config(show)
    show.set_defaults(run=_show)

    text = "Say what is installed, what of it is used and what is broken; exit code 2 if something is."
    commands.add_parser("doctor", help="what is installed, used and broken here", description=text).set_defaults(run=_doctor)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/dft.yaml")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="dotted keys that replace values of the file: train.steps=20")


def _add_conversions(commands) -> None:
    layout = "parallel.tensor=2, parallel.pipeline=2, ...: the layout of this job, under torchrun; the result fits any other"
    text = "Make a run directory from a Hugging Face model (Llama, Qwen2, Qwen3; safetensors): checkpoint.init=RUN_DIR starts from it."
    take = commands.add_parser("import", help="a Hugging Face model becomes a run directory to train from", description=text)
    take.add_argument("source", metavar="HF_DIR", help="config.json, *.safetensors and a tokenizer")
    take.add_argument("target", metavar="RUN_DIR", help="is made")
    take.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=layout + "; train.dtype=fp32|bf16: of the checkpoint")
    take.set_defaults(run=_import)

    text = "Write a run's newest checkpoint, or the one given, as a Hugging Face directory that transformers and vLLM load."
    give = commands.add_parser("export", help="a checkpoint becomes a Hugging Face model", description=text)
    give.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run directory, or one of its checkpoints/step_*")
    give.add_argument("target", metavar="HF_DIR", help="is made")
    give.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=layout)
    give.add_argument("--like", metavar="HF_DIR", help="whose config.json to write; default: that of the model imported at first, if there was one")
    give.add_argument("--dtype", choices=("fp32", "bf16"), help="of the tensors; default: the run's")
    give.set_defaults(run=_export)


def _add_serve(commands) -> None:
    text = ("Start a vLLM server for rollout.engine=server, on this machine.  It begins with random weights and generates once a trainer has sent it "
            "its own.  Whoever reaches the port can replace the model: it listens on loopback unless --public names another address.")  # fmt: skip
    serve = commands.add_parser("serve", help="a rollout server for training jobs", description=text)
    serve.add_argument("model", metavar="MODEL_DIR", help="config.json: RUN_DIR/engine of a run, or a Hugging Face directory")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    serve.add_argument("--public", action="store_true", help="allow a --host that other machines reach, on a network you trust")
    serve.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    serve.add_argument("--transfer", choices=("shm", "gloo", "nccl"), help="as rollout.transfer of the job; default: nccl on GPUs, else shm")
    serve.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="of the engine's weights (%(default)s)")
    serve.add_argument("--max-model-len", type=int, default=2048, help="at least data.seq_length of the job (%(default)s)")
    serve.add_argument("--tensor", type=int, default=1, help="GPUs that share the model (%(default)s)")
    serve.add_argument("--memory", type=float, default=0.0, help="share of the GPU's memory, or GiB of key-value cache on a CPU")
    serve.set_defaults(run=_serve)


def _train(arguments: argparse.Namespace) -> None:
    from megatron_plugin.config import load_config
    from megatron_plugin.config.checks import check_files

    config = load_config(arguments.config, arguments.overrides, world_size=_int_variable("WORLD_SIZE", 1))
    check_files(config)
    _before_megatron()
    from megatron_plugin.trainer.loop import train

    train(config)


def _before_megatron() -> None:
    """Looks for packages that make importing megatron.core impossible, and quiets it: without Transformer Engine and apex it says so in a
    dozen warnings per rank, on every start."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from megatron_plugin.hooks.accelerators import check_accelerators

    for line in check_accelerators():
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron-plugin: {line}", file=sys.stderr)


def _import(arguments: argparse.Namespace) -> None:
    from megatron_plugin.hooks.weights.hf_config import read_hf_config, transformer_fields

    transformer_fields(read_hf_config(arguments.source))  # refused here, before torch is imported
    _before_megatron()
    from megatron_plugin.trainer.convert import import_model

    import_model(arguments.source, arguments.target, arguments.overrides, world_size=_int_variable("WORLD_SIZE", 1))


def _export(arguments: argparse.Namespace) -> None:
    _before_megatron()
    from megatron_plugin.trainer.convert import export_model

    world_size = _int_variable("WORLD_SIZE", 1)
    export_model(arguments.source, arguments.target, arguments.overrides, like=arguments.like, dtype=arguments.dtype, world_size=world_size)


def _serve(arguments: argparse.Namespace) -> None:
    from megatron_plugin.rollout.serve import serve

    serve(
        arguments.model, host=arguments.host, port=arguments.port, public=arguments.public, dtype=arguments.dtype, memory=arguments.memory,
        options=dict(transfer=arguments.transfer, max_model_len=arguments.max_model_len, tensor=arguments.tensor),
    )  # fmt: skip


def _show(arguments: argparse.Namespace) -> None:
    from megatron_plugin.config import load_config, to_yaml

    ranks = _int_variable("WORLD_SIZE", 0)
    print(to_yaml(load_config(arguments.config, arguments.overrides, world_size=ranks or None)), end="")


def _doctor(arguments: argparse.Namespace) -> None:
    from megatron_plugin.doctor import report

    report()


def _int_variable(name: str, default: int) -> int:
    value = os.environ.get(name, "") or str(default)
    if not value.isdecimal():
        raise UsageError(f"environment variable {name}: got {value!r}, expected a whole number (torchrun sets it)")
    return int(value)


def _exit_code(error: Exception) -> int | None:
    """The code an error asks for; None for one that is not the person's to mend."""
    code = getattr(error, "exit_code", None)
    return code if isinstance(code, int) else None


def _leave(code: int | None, error: Exception) -> int:
    """Says what happened, once per job, and returns the exit code (under torchrun: ends the process with it)."""
    expected = code is not None
    code = 1 if code is None else code
    text = f"megatron-plugin: error: {error}" if expected else "".join(traceback.format_exception(error)).rstrip()
    if "RANK" not in os.environ:
        print(text, file=sys.stderr)
        return code
    # A handler of the trainer (preemption) must not keep alive a rank that is only waiting to be ended.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank = os.environ["RANK"]
    first = _is_first(expected, error)
    if first:
        print(text if expected and rank == "0" else f"rank {rank}: {text}", file=sys.stderr, flush=True)
        _tell_torchrun(text)
    elif not expected:
        print(f"rank {rank}: failed after another rank, with {type(error).__name__}", file=sys.stderr, flush=True)
        # Had we exited before the first rank, torchrun might name us as the root cause.  It ends us as soon as that one has exited.
        time.sleep(WAIT_OTHERS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: leaving a process group whose other members hang can hang too, in its destructor


def _is_first(expected: bool, error: Exception) -> bool:
    """Whether this rank is the one that speaks; waits where another is likelier to know more."""
    if expected and os.environ["RANK"] != "0":
        time.sleep(WAIT_LOCAL_ZERO if os.environ.get("LOCAL_RANK") == "0" else WAIT_OTHERS)
    elif not expected and any(sign in f"{type(error).__name__}: {error}" for sign in LOST_PEER):
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


if __name__ == "__main__":
    sys.exit(main())
