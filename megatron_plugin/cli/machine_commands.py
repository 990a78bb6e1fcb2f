"""Commands about this machine and what is on it: doctor, bench."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_plugin.cli.arguments import UsageError, count, whole

__all__ = ["add_bench", "add_doctor"]

OPS = ("stats", "token_loss", "linear_token_loss")
"""Those of bench/run.py, which imports torch."""


def add_bench(commands) -> None:
    text = ("Time our ops on this machine beside eager PyTorch and torch.compile: log-probability and entropy (stats), a weighted loss from logits "
            "(token_loss) and from hidden states (linear_token_loss), forward and backward.  Under a minute by default.")  # fmt: skip
    bench = commands.add_parser("bench", help="our ops on this machine, beside eager PyTorch and torch.compile", description=text)
    bench.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="(all)")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    bench.add_argument("--tokens", type=count, metavar="N", help="rows of the logits (512; on a GPU 8192)")
    bench.add_argument("--vocab", type=count, metavar="N", help="their columns (32768; on a GPU 151936)")
    bench.add_argument("--hidden", type=count, metavar="N", help="channels, of linear_token_loss (512; on a GPU 4096)")
    bench.add_argument("--dtype", choices=("fp32", "bf16"), help="(fp32; on a GPU bf16)")
    bench.add_argument("--limit", type=count, default=55, metavar="SECONDS", help="after three quarters of it no contender is begun (%(default)s)")
    bench.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes seconds to start")
    bench.add_argument("--quick", action="store_true", help="tiny sizes, two calls each: tests the installation, measures nothing")
    bench.add_argument("--out", metavar="JSON", default="bench.json", help="rows and environment (%(default)s)")
    bench.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    if Path(arguments.out).is_dir():
        raise UsageError(f"got --out {arguments.out}, which is a directory, expected a file to write")
    from megatron_plugin.config.checks import check_folder

    check_folder(Path(arguments.out).parent, "--out")
    import torch

    from megatron_plugin.bench.run import Options, bench

    sizes = {name: getattr(arguments, name) for name in ("tokens", "vocab", "hidden", "dtype")}
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(tuple(arguments.ops), device, **sizes, limit_s=arguments.limit, compile=not arguments.no_compile, quick=arguments.quick)
    bench(options, Path(arguments.out))


def add_doctor(commands) -> None:
    text = ("Say what is installed, what of it is used, what is broken, and what is missing for which feature; exit code 2 if something is broken.  With "
            "--config or --tokenizer: whether tokenizer and model go together.  With --data: read data files as training does and say what is in them "
            "and which lines are bad, as file:line: reason; exit code 4 if any is.")  # fmt: skip
    doctor = commands.add_parser("doctor", help="what is installed, used, broken and missing here; --data: and in data files", description=text)
    doctor.add_argument("--data", metavar="FILE", nargs="+", help="jsonl; the installation is not looked at")
    doctor.add_argument("--tokenizer", metavar="DIR", default="", help="say whether it is whole; with --data: tokenise each line too, and say how long they are")
    doctor.add_argument("--config", metavar="CONFIG", default="", help="say whether its tokenizer fits its model; without --tokenizer: data.tokenizer")
    doctor.add_argument("--seq-length", type=count, default=0, metavar="N", help="with --tokenizer: a longer line is bad, as with data.seq_length=N")
    doctor.add_argument("--train-on", choices=("all", "last"), default="all", help="as data.train_on (%(default)s)")
    doctor.add_argument("--show", type=whole, default=20, metavar="N", help="bad lines of each file that are printed; all are counted (%(default)s)")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from megatron_plugin.cli.prechecks import check_some_file, check_tokenizer

    if arguments.seq_length and not arguments.tokenizer:
        raise UsageError("got --seq-length without --tokenizer, expected both: the length is in tokens")
    if arguments.data:
        check_some_file(arguments.data)
    config, tokenizer = None, arguments.tokenizer
    if arguments.config:
        from megatron_plugin.config import load_config

        config = load_config(arguments.config)
        tokenizer = tokenizer or config.data.tokenizer or (str(Path(config.checkpoint.init) / "tokenizer") if config.checkpoint.init else "")
        if not tokenizer:
            raise UsageError(f"got {arguments.config}, which names no tokenizer, so training makes one that fits; expected data.tokenizer in it, or --tokenizer DIR")
    if tokenizer:
        check_tokenizer(tokenizer)
    from megatron_plugin.doctor import report, report_data, report_vocabulary

    if tokenizer and (config or not arguments.data):
        report_vocabulary(tokenizer, config)
    if arguments.data:
        report_data(arguments.data, tokenizer=tokenizer, seq_length=arguments.seq_length, train_on=arguments.train_on, shown=arguments.show)
    elif not tokenizer:
        report()
