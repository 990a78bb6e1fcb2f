"""The commands: what each takes from the command line, and the function of the package that it is.

Nothing heavy is imported here before the arguments are known to be right: every command imports what it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from megatron_plugin import __version__  # no torch behind it

__all__ = ["UsageError", "parser"]

USAGE_ERROR = 2


class UsageError(Exception):
    """The command line does not parse."""

    exit_code = USAGE_ERROR


class Parser(argparse.ArgumentParser):
    """argparse that raises, so that a usage error under torchrun is printed by one rank like every other."""

    def error(self, message: str) -> NoReturn:
        _, stray, rest = message.partition("unrecognized arguments: ")
        hint = "; overrides are written key=value without dashes, such as train.steps=20" if rest.startswith("-") else ""
        if stray and "=" in rest and not hint:  # argparse takes all positional arguments in one go
            hint = "; overrides stand together, before or behind all options"
        raise UsageError(f"{message}{hint}\n{self.format_usage().rstrip()}")


def parser() -> Parser:
    """The command line; the parsed arguments have the function to call with them as `run`."""
    whole = Parser(
        prog="megatron-plugin",
        description="Fine-tune with weighted on-policy-SFT losses on megatron-core.",
        epilog="exit codes: 0 done, 2 configuration, 3 no usable checkpoint, 4 data, 5 no rollouts, 17 loss or gradient not a number, 1 anything else",
    )
    whole.add_argument("--version", action="version", version=f"megatron-plugin {__version__}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    text = "Fine-tune as a configuration says.  With more than one rank: torchrun --nproc-per-node N -m megatron_plugin.cli train ..."
    train = commands.add_parser("train", help="fine-tune as a configuration says", description=text)
    _add_config(train)
    train.set_defaults(run=_train)

    _add_conversions(commands)
    _add_score(commands)
    _add_realign(commands)
    _add_serve(commands)
    config = commands.add_parser("config", help="look at a configuration", description="Look at a configuration.")
    actions = config.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=Parser)
    text = "Print the whole configuration as YAML, with the origin of what is not a default.  WORLD_SIZE=N checks it for N ranks."
    show = actions.add_parser("show", help="the resolved configuration, with where each value comes from", description=text)
    _add_config(show)
    show.set_defaults(run=_show)

    text = "Say what is installed, what of it is used and what is broken; exit code 2 if something is."
    commands.add_parser("doctor", help="what is installed, used and broken here", description=text).set_defaults(run=_doctor)
    return whole


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


def _add_score(commands) -> None:
    text = ("Say how on-distribution a data set is for a model: log p, entropy and their sum (cll) of every sample, a histogram, a one-page report "
            "and the worst samples.  A second start goes on where the first one ended.  With more ranks: torchrun ... -m megatron_plugin.cli score ...")  # fmt: skip
    score = commands.add_parser("score", help="how on-distribution a data set is for a model", description=text)
    score.add_argument("data", metavar="DATA", help="jsonl, as for training")
    score.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="a run directory, or one of its checkpoints/step_*; with --url the served HF directory")
    score.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="parallel.tensor=2, ...: the layout; data.seq_length=N: longer samples are cut")
    score.add_argument("--out", metavar="DIR", help="for scores.jsonl, report.md and cll.png; default: scores/<name of DATA>")
    score.add_argument("--samples", type=_count, default=0, metavar="N", help="only the first N lines; default: all")
    score.add_argument("--worst", type=_count, default=20, metavar="N", help="samples shown in the report (%(default)s)")
    score.add_argument("--rows", type=_count, default=8, metavar="N", help="rows of one forward pass and rank (%(default)s)")
    score.add_argument("--url", default="", help="score with this vLLM server (vllm serve HF_DIR) instead: log p only, no entropy")
    score.set_defaults(run=_score)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")
    return int(text)


def _add_realign(commands) -> None:
    text = ("Turn expert data into data that the model could have written itself (hinted decoding, arXiv 2602.12222), with a vLLM that is started here: "
            "the model's own answer where it is right, else one drawn with the expert's as a hint, if that is right.  A second start goes on where the "
            "first one ended.")  # fmt: skip
    realign = commands.add_parser("realign", help="expert data in the model's own words, for SFT or IDFT", description=text)
    realign.add_argument("data", metavar="DATA", help="jsonl, as for training")
    realign.add_argument("model", metavar="MODEL_DIR", help="Hugging Face directory with weights and tokenizer, as `megatron-plugin export` writes it")
    realign.add_argument("--out", metavar="DIR", help="for realigned.jsonl and rejected.jsonl; default: realigned/<name of DATA>")
    realign.add_argument("--samples", type=_count, default=0, metavar="N", help="only the first N lines; default: all")
    realign.add_argument("--reward", default="numeric", help="verifies answers: numeric, math or package.module.function (%(default)s)")
    realign.add_argument("--unaided", type=_whole, default=1, metavar="N", help="answers without help: 1 greedy, more sampled, 0 none (%(default)s)")
    realign.add_argument("--beta", type=float, default=0.7, help="how soon the question alone speaks; 0: the hinted stream alone (%(default)s)")
    realign.add_argument("--temperature", type=float, default=0.3, help="of hinted decoding (%(default)s)")
    realign.add_argument("--max-tokens", type=_count, default=8192, metavar="N", help="of an answer (%(default)s)")
    realign.add_argument("--splitter", default="\\boxed{", metavar="TEXT", help="after it the question alone speaks; '': never (%(default)s)")
    realign.add_argument("--analysis-prompt", metavar="FILE", help="system turn that asks for an analysis, a line '# CoT' and an answer; default: ours")
    realign.add_argument("--concurrency", type=_count, default=32, metavar="N", help="pairs drawn at once (%(default)s)")
    realign.add_argument("--context", type=_count, default=0, metavar="N", help="tokens of prompt and answer; default: the model's, at most 32768")
    realign.add_argument("--memory", type=float, default=0.0, help="share of the GPU's memory, or GiB of key-value cache on a CPU")
    realign.add_argument("--tensor", type=_count, default=1, help="GPUs that share the model (%(default)s)")
    realign.add_argument("--seed", type=_whole, default=0, help="(%(default)s)")
    realign.set_defaults(run=_realign)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 0")
    return int(text)


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


def _score(arguments: argparse.Namespace) -> None:
    if arguments.url and arguments.overrides:
        raise UsageError(f"got {arguments.overrides[0]!r} beside --url, expected no overrides: the server decides how the model runs")
    data = _file(arguments.data, "a jsonl file")
    _before_megatron()
    from megatron_plugin.trainer.scoring import Task, score_with_checkpoint, score_with_engine

    out = Path(arguments.out or f"scores/{data.stem}")
    task = Task(data, out, samples=arguments.samples, worst=arguments.worst, rows=arguments.rows, url=arguments.url)
    if arguments.url:
        score_with_engine(task, arguments.model)
    else:
        score_with_checkpoint(task, arguments.model, arguments.overrides, world_size=_int_variable("WORLD_SIZE", 1))


def _file(name: str, what: str) -> Path:
    if not Path(name).is_file():
        from megatron_plugin.config import DataPathError

        raise DataPathError(f"got {name!r}, expected {what} that exists, relative to {Path.cwd()}")
    return Path(name)


def _realign(arguments: argparse.Namespace) -> None:
    if _int_variable("WORLD_SIZE", 1) > 1:
        raise UsageError("got more than one rank, expected the command without torchrun: it starts one vLLM, and --tensor shares the model among GPUs")
    names = ("samples", "reward", "unaided", "beta", "temperature", "max_tokens", "splitter", "concurrency", "context", "memory", "tensor", "seed")
    given = {name: getattr(arguments, name) for name in names}
    data = _file(arguments.data, "a jsonl file")
    _file(str(Path(arguments.model) / "config.json"), "a Hugging Face directory with a config.json")
    if arguments.analysis_prompt:
        given["analysis_prompt"] = _file(arguments.analysis_prompt, "a text file").read_text("utf-8").strip()
    from megatron_plugin.trainer.realigning import RealignTask, realign_file

    realign_file(RealignTask(data=data, model=Path(arguments.model), out=Path(arguments.out or f"realigned/{data.stem}"), **given))


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
