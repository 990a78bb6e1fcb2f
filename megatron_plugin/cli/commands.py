"""The commands: what each takes from the command line, and the function of the package that it is.

Nothing heavy is imported here before the arguments are known to be right: every command imports what it runs.
"""

from __future__ import annotations

import argparse

from megatron_plugin import __version__  # no torch behind it
from megatron_plugin.cli.arguments import Parser, add_config, before_megatron, int_variable
from megatron_plugin.cli.data_commands import add_eval, add_realign, add_score
from megatron_plugin.cli.machine_commands import add_bench, add_doctor
from megatron_plugin.cli.run_commands import add_plot, add_report

__all__ = ["parser"]


def parser() -> Parser:
    """The command line; the parsed arguments have the function to call with them as `run`."""
    whole = Parser(
        prog="megatron-plugin",
        description="Fine-tune with weighted on-policy-SFT losses on megatron-core.",
        epilog="exit codes: 0 done, 2 configuration, 3 no usable checkpoint, 4 data, 5 no rollouts, 12 out of memory, 17 loss or gradient not a number,"
        " 130 Ctrl-C, 143 SIGTERM (both: after saving the last step), 1 anything else",
    )
    whole.add_argument("--version", action="version", version=f"megatron-plugin {__version__}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    text = "Fine-tune as a configuration says.  With more than one rank: torchrun --nproc-per-node N -m megatron_plugin.cli train ..."
    train = commands.add_parser("train", help="fine-tune as a configuration says", description=text)
    add_config(train)
    train.set_defaults(run=_train)

    _add_conversions(commands)
    add_eval(commands)
    add_report(commands)
    add_plot(commands)
    add_score(commands)
    add_realign(commands)
    _add_serve(commands)
    text = "Look at a configuration, or get some to begin from."
    config = commands.add_parser("config", help="look at a configuration, or get some to begin from", description=text)
    actions = config.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=Parser)
    text = "Print the whole configuration as YAML, with the origin of what is not a default.  WORLD_SIZE=N checks it for N ranks."
    show = actions.add_parser("show", help="the resolved configuration, with where each value comes from", description=text)
    add_config(show)
    show.set_defaults(run=_show)
    text = "Copy the configurations that come with the package into a folder.  What is there already and differs is never replaced."
    init = actions.add_parser("init", help="copies of the shipped configurations", description=text)
    init.add_argument("folder", metavar="DIR", nargs="?", default="configs", help="is made (%(default)s)")
    init.set_defaults(run=_init)

    add_bench(commands)
    add_doctor(commands)
    return whole


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
    serve.add_argument("--max-model-len", type=int, default=0, help="at least data.seq_length of the job; default: the model's")
    serve.add_argument("--tensor", type=int, default=1, help="GPUs that share the model (%(default)s)")
    serve.add_argument("--memory", type=float, default=0.0, help="share of the GPU's memory, or GiB of key-value cache on a CPU")
    serve.add_argument("--log", default="", metavar="FILE", help="for what vLLM says; default: serve-PORT.log")
    serve.set_defaults(run=_serve)


def _train(arguments: argparse.Namespace) -> None:
    from megatron_plugin.cli.prechecks import check_packages
    from megatron_plugin.config import load_config
    from megatron_plugin.config.checks import check_files

    config = load_config(arguments.config, arguments.overrides, world_size=int_variable("WORLD_SIZE", 1), smoke=arguments.smoke)
    check_files(config)
    check_packages(config)
    if arguments.smoke:
        _begin_smoke(config)
    before_megatron()
    from megatron_plugin.trainer.loop import train

    train(config)


def _begin_smoke(config) -> None:
    """Says what is other than in the file, and clears the run directory: before this rank meets the others, which may then look into it."""
    from megatron_plugin.config.smoke import fresh_run_dir, smoke_line

    if int_variable("LOCAL_RANK", 0) == 0:
        fresh_run_dir(config)
    if int_variable("RANK", 0) == 0:
        print(smoke_line(config), flush=True)


def _import(arguments: argparse.Namespace) -> None:
    from megatron_plugin.cli.prechecks import check_layout, check_new_folder
    from megatron_plugin.hooks.weights.hf_config import read_hf_config, transformer_fields

    world_size = int_variable("WORLD_SIZE", 1)
    fields = transformer_fields(read_hf_config(arguments.source))  # refused here, as all that follows, before torch is imported
    check_layout({"model": fields.transformer | fields.gpt}, arguments.overrides, world_size, settable=("parallel.", "train.dtype="))
    check_new_folder(arguments.target, "a run directory to be made")
    before_megatron()
    from megatron_plugin.trainer.convert import import_model

    import_model(arguments.source, arguments.target, arguments.overrides, world_size=world_size)


def _export(arguments: argparse.Namespace) -> None:
    from megatron_plugin.cli.prechecks import check_checkpoint, check_hf_folder, check_layout, check_new_folder, run_values

    world_size = int_variable("WORLD_SIZE", 1)
    check_checkpoint(arguments.source)
    check_layout(run_values(arguments.source), arguments.overrides, world_size, settable=("parallel.",))
    check_new_folder(arguments.target, "a Hugging Face directory to be made")
    if arguments.like:
        check_hf_folder(arguments.like)
    before_megatron()
    from megatron_plugin.trainer.convert import export_model

    export_model(arguments.source, arguments.target, arguments.overrides, like=arguments.like, dtype=arguments.dtype, world_size=world_size)


def _serve(arguments: argparse.Namespace) -> None:
    from megatron_plugin.cli.prechecks import check_port, check_served, check_vllm_there

    check_served(arguments.model)
    check_port(arguments.port)
    check_vllm_there("serve")
    from megatron_plugin.rollout.serve import serve

    serve(
        arguments.model, host=arguments.host, port=arguments.port, public=arguments.public, dtype=arguments.dtype, memory=arguments.memory,
        log=arguments.log, options=dict(transfer=arguments.transfer, max_model_len=arguments.max_model_len, tensor=arguments.tensor),
    )  # fmt: skip


def _show(arguments: argparse.Namespace) -> None:
    from megatron_plugin.config import load_config, to_yaml

    ranks = int_variable("WORLD_SIZE", 0)
    print(to_yaml(load_config(arguments.config, arguments.overrides, world_size=ranks or None, smoke=arguments.smoke)), end="")


def _init(arguments: argparse.Namespace) -> None:
    from megatron_plugin.config.starters import write_starters

    for path in write_starters(arguments.folder):
        print(path)
