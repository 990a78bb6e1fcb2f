"""Commands about data: score, realign, eval."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_plugin.cli.arguments import UsageError, before_megatron, count, existing_file, int_variable, whole

__all__ = ["add_eval", "add_realign", "add_score"]

SCORABLE = ("parallel.", "train.dtype=", "data.seq_length=", "data.packing=", "data.train_on=")
"""Beginnings of the overrides that score and eval take."""


def add_score(commands) -> None:
    text = ("Say how on-distribution a data set is for a model: log p, entropy and their sum (cll) of every sample, a histogram, a one-page report "
            "and the worst samples.  A second start goes on where the first one ended.  With more ranks: torchrun ... -m megatron_plugin.cli score ...")  # fmt: skip
    score = commands.add_parser("score", help="how on-distribution a data set is for a model", description=text)
    score.add_argument("data", metavar="DATA", help="jsonl, as for training")
    score.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="a run directory, one of its checkpoints/step_*, or a Hugging Face directory (with --url: the served one)")
    score.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="parallel.tensor=2, ...: the layout; data.seq_length=N: longer samples are cut")
    score.add_argument("--out", metavar="DIR", help="for scores.jsonl, report.html and cll.png; default: scores/<name of DATA>")
    score.add_argument("--samples", type=count, default=0, metavar="N", help="only the first N lines; default: all")
    score.add_argument("--worst", type=count, default=20, metavar="N", help="samples shown in the report (%(default)s)")
    score.add_argument("--rows", type=count, default=8, metavar="N", help="rows of one forward pass and rank (%(default)s)")
    score.add_argument("--url", default="", help="score with this vLLM server (vllm serve HF_DIR) instead: log p only, no entropy")
    score.set_defaults(run=_score)


def _score(arguments: argparse.Namespace) -> None:
    from megatron_plugin.cli.prechecks import check_checkpoint, check_hf_folder, check_layout, run_values

    if arguments.url and arguments.overrides:
        raise UsageError(f"got {arguments.overrides[0]!r} beside --url, expected no overrides: the server decides how the model runs")
    data = existing_file(arguments.data, "a jsonl file")
    finished = (Path(arguments.model) / "config.json").is_file()
    if finished and (arguments.overrides or int_variable("WORLD_SIZE", 1) > 1):
        raise UsageError(f"got a Hugging Face directory, {arguments.model}, with overrides or several ranks; expected neither: one process scores it, and "
                         "megatron-plugin import makes a run directory of it")  # fmt: skip
    if arguments.url:
        check_hf_folder(arguments.model)
    elif not finished:
        check_checkpoint(arguments.model)
        check_layout(run_values(arguments.model), arguments.overrides, int_variable("WORLD_SIZE", 1), settable=SCORABLE)
    before_megatron()
    from megatron_plugin.trainer.scoring import Task, score_with_checkpoint, score_with_directory, score_with_engine

    out = Path(arguments.out or f"scores/{data.stem}")
    task = Task(data, out, samples=arguments.samples, worst=arguments.worst, rows=arguments.rows, url=arguments.url)
    if arguments.url:
        score_with_engine(task, arguments.model)
    elif finished:
        score_with_directory(task, Path(arguments.model))
    else:
        score_with_checkpoint(task, arguments.model, arguments.overrides, world_size=int_variable("WORLD_SIZE", 1))


def add_eval(commands) -> None:
    text = ("Evaluate a model on held-out data: NLL and cll of its answers, then answers drawn by a vLLM that is started here and verified: mean@k and "
            "pass@k with their spread, on one page.  A second start goes on where the first one ended.")  # fmt: skip
    evaluate = commands.add_parser("eval", help="NLL, cll and verified answers of a model on held-out data", description=text)
    evaluate.add_argument("data", metavar="DATA", help="jsonl, as for training")
    evaluate.add_argument("model", metavar="MODEL", help="a run directory, one of its checkpoints/step_*, or a Hugging Face directory")
    evaluate.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="parallel.tensor=2, ...: the layout, under torchrun; data.seq_length=N")
    evaluate.add_argument("--out", metavar="DIR", help="for report.html, numbers.json, answers.jsonl; default: eval/<name of DATA>")
    evaluate.add_argument("--samples", type=count, default=0, metavar="N", help="only the first N lines; default: all")
    evaluate.add_argument("--n", type=whole, default=4, metavar="N", help="answers drawn per question beside the greedy one (%(default)s)")
    evaluate.add_argument("--no-answers", action="store_true", help="NLL and cll alone, without vLLM")
    evaluate.add_argument("--temperature", type=float, default=1.0, help="of the answers drawn (%(default)s)")
    evaluate.add_argument("--top-p", type=float, default=1.0, help="the same (%(default)s)")
    evaluate.add_argument("--max-tokens", type=count, default=1024, metavar="N", help="of an answer (%(default)s)")
    evaluate.add_argument("--reward", default="numeric", help="verifies answers: numeric, math or package.module.function (%(default)s)")
    evaluate.add_argument("--context", type=count, default=0, metavar="N", help="tokens of prompt and answer; default: the model's, at most 32768")
    evaluate.add_argument("--memory", type=float, default=0.0, help="share of the GPU's memory, or GiB of key-value cache on a CPU")
    evaluate.add_argument("--tensor", type=count, default=1, help="GPUs that share the model in vLLM (%(default)s)")
    evaluate.add_argument("--seed", type=whole, default=0, help="(%(default)s)")
    evaluate.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> None:
    from megatron_plugin.cli.prechecks import check_checkpoint, check_layout, check_reward, check_vllm_there, run_values

    names = ("samples", "n", "temperature", "top_p", "max_tokens", "reward", "context", "memory", "tensor", "seed")
    data = existing_file(arguments.data, "a jsonl file")
    ranks = int_variable("WORLD_SIZE", 1)
    if not (Path(arguments.model) / "config.json").is_file():
        check_checkpoint(arguments.model)
        check_layout(run_values(arguments.model), arguments.overrides, ranks, settable=SCORABLE)
    if not arguments.no_answers:
        check_reward(arguments.reward)
        check_vllm_there("eval draws answers, unless --no-answers says otherwise")
    before_megatron()
    from megatron_plugin.trainer.evaluating import EvalTask, evaluate_file

    task = EvalTask(data=data, out=Path(arguments.out or f"eval/{data.stem}"), **{name: getattr(arguments, name) for name in names})
    evaluate_file(task, Path(arguments.model), arguments.overrides, world_size=ranks, answers=not arguments.no_answers)


def add_realign(commands) -> None:
    text = ("Turn expert data into data that the model could have written itself (hinted decoding, arXiv 2602.12222), with a vLLM that is started here: "
            "the model's own answer where it is right, else one drawn with the expert's as a hint, if that is right.  A second start goes on where the "
            "first one ended.")  # fmt: skip
    realign = commands.add_parser("realign", help="expert data in the model's own words, for SFT or IDFT", description=text)
    realign.add_argument("data", metavar="DATA", help="jsonl, as for training")
    realign.add_argument("model", metavar="MODEL_DIR", help="Hugging Face directory with weights and tokenizer, as `megatron-plugin export` writes it")
    realign.add_argument("--out", metavar="DIR", help="for realigned.jsonl and rejected.jsonl; default: realigned/<name of DATA>")
    realign.add_argument("--samples", type=count, default=0, metavar="N", help="only the first N lines; default: all")
    realign.add_argument("--reward", default="numeric", help="verifies answers: numeric, math or package.module.function (%(default)s)")
    realign.add_argument("--unaided", type=whole, default=1, metavar="N", help="answers without help: 1 greedy, more sampled, 0 none (%(default)s)")
    realign.add_argument("--beta", type=float, default=0.7, help="how soon the question alone speaks; 0: the hinted stream alone (%(default)s)")
    realign.add_argument("--temperature", type=float, default=0.3, help="of hinted decoding (%(default)s)")
    realign.add_argument("--max-tokens", type=count, default=8192, metavar="N", help="of an answer (%(default)s)")
    realign.add_argument("--splitter", metavar="TEXT", help="after it the question alone speaks; '': never; default: #### for --reward numeric, else \\boxed{")
    realign.add_argument("--analysis-prompt", metavar="FILE", help="system turn that asks for an analysis, a line '# CoT' and an answer; default: ours")
    realign.add_argument("--concurrency", type=count, default=32, metavar="N", help="pairs drawn at once (%(default)s)")
    realign.add_argument("--context", type=count, default=0, metavar="N", help="tokens of prompt and answer; default: the model's, at most 32768")
    realign.add_argument("--memory", type=float, default=0.0, help="share of the GPU's memory, or GiB of key-value cache on a CPU")
    realign.add_argument("--tensor", type=count, default=1, help="GPUs that share the model (%(default)s)")
    realign.add_argument("--seed", type=whole, default=0, help="(%(default)s)")
    realign.add_argument("--no-score", dest="score", action="store_false", help="without the cll of each record, which needs the model on one device")
    realign.set_defaults(run=_realign)


def _realign(arguments: argparse.Namespace) -> None:
    from megatron_plugin.cli.prechecks import check_hf_folder, check_reward, check_vllm_there

    if int_variable("WORLD_SIZE", 1) > 1:
        raise UsageError("got more than one rank, expected the command without torchrun: it starts one vLLM, and --tensor shares the model among GPUs")
    names = ("samples", "reward", "unaided", "beta", "temperature", "max_tokens", "splitter", "concurrency", "context", "memory", "tensor", "seed", "score")
    given = {name: getattr(arguments, name) for name in names}
    data = existing_file(arguments.data, "a jsonl file")
    check_hf_folder(arguments.model)
    check_reward(arguments.reward)
    if arguments.splitter is None:
        given["splitter"] = "####" if arguments.reward == "numeric" else "\\boxed{"
    if arguments.analysis_prompt:
        given["analysis_prompt"] = existing_file(arguments.analysis_prompt, "a text file").read_text("utf-8").strip()
    check_vllm_there("realign")
    from megatron_plugin.trainer.realigning import RealignTask, realign_file

    realign_file(RealignTask(data=data, model=Path(arguments.model), out=Path(arguments.out or f"realigned/{data.stem}"), **given))
