# SPDX-License-Identifier: Apache-2.0
r"""Measures a checkpoint: held-out text and questions, language tasks, multimodal benchmarks, and the routing.

    torchrun --nproc-per-node 2 tools/evaluate.py --load CHECKPOINT --output results.json \
        --text held_out.jsonl --vqa questions.json --image-root DIR  [--expert-model-parallel-size 2 ...]
    torchrun --nproc-per-node 8 tools/evaluate.py --load CHECKPOINT --output results.json \
        --tasks smar --tasks-data DIR --benchmarks pope mme --benchmarks-data DIR
    python tools/evaluate.py --export EXPORT --output results.json --tasks smar --tasks-data DIR

The model's flags, its vision model, tokenizer, conversation template and tiles are read from the checkpoint, which is
of a run or an import. Flags of pretrain_vlm.py that are given (layout, precision, --vision-model, --seq-length ...)
override them.
--text: records with a `text`. Measured: perplexity, and the share of words of several tokens that are completed
exactly, given the text up to their first token. --vqa: records with `image` (a path or a list), `question`, `answer`
and optionally a `kind` to group by. Measured: the share of exact answers, and the routing.
Both files are JSON lists or JSON lines, as for prepare.py.
--tasks: tasks of EleutherAI's lm-evaluation-harness, `smar` for the paper's eight. --benchmarks: the paper's nine
multimodal benchmarks. docs/evaluation.md describes both, and the files that they need.
--export evaluates a Hugging Face export, or the language model that was imported, with the harness's own `hf` model
instead of a checkpoint: --tasks alone.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_smar import runtime

runtime.install_or_exit()

import torch.distributed as dist
from megatron.training import get_args

from megatron_smar.checkpoint.location import locate
from megatron_smar.checkpoint.stored_flags import stored_flags
from megatron_smar.config.run_file import saved_folder
from megatron_smar.data.held_out import read_questions, read_texts
from megatron_smar.evaluation.benchmark_run import BenchmarkRunner, read_benchmarks, routing_result
from megatron_smar.evaluation.benchmarks import BENCHMARKS
from megatron_smar.evaluation.encoder import HeldOutEncoder, run_evaluator
from megatron_smar.evaluation.evaluator import Evaluator, exact_match, perplexity, word_completion
from megatron_smar.evaluation.generation import generate
from megatron_smar.evaluation.language.results import KEY, format_results
from megatron_smar.evaluation.language.task_config import LanguageConfig
from megatron_smar.evaluation.language.tasks import load_tasks
from megatron_smar.monitoring.recorder import recorded_routing
from megatron_smar.training.setup import fail, start

# The alltoall dispatcher accepts batches of any length; Megatron's batch sizes and frozen parts have no effect here.
# The other ranks wait while rank 0 reads the language tasks, which may have to be downloaded.
RUN = {
    "moe_token_dispatcher_type": "alltoall",
    "micro_batch_size": 1,
    "freeze": ["vision"],
    "distributed_timeout_minutes": 120,
}


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Parses this program's options; returns them and the remaining flags, which are those of pretrain_vlm.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_samples(parser)
    parser.add_argument("--examples", type=int, default=24, help="answers decoded and shown (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--config", type=Path, help="a run's run.yaml, instead of --load with its folder")
    add_tasks(parser)
    add_benchmarks(parser)
    options, flags = parser.parse_known_args()
    try:
        _check(options, flags)
        return options, [*flags, *(["--load", str(saved_folder(options.config))] if options.config else [])]
    except ValueError as error:
        fail(error)


def _check(options: argparse.Namespace, flags: list[str]) -> None:
    """Refuses options that measure nothing or exclude each other.

    Raises:
        ValueError: The message is one sentence for the user.
    """
    others = options.text or options.vqa or options.benchmarks
    if not (others or options.tasks):
        raise ValueError("nothing is measured: give --text, --vqa, --tasks or --benchmarks.")
    if options.export and (flags or options.config or options.float32 or others or not options.tasks):
        raise ValueError(
            "--export is evaluated on --tasks alone: give no samples, benchmarks or flags of a checkpoint."
        )
    if options.export and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--export is evaluated by one process: start python instead of torchrun.")
    for name in ("batch_size", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; give 1 or more.")
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.open("a").close()
        except OSError as error:
            raise ValueError(f"--output {options.output} cannot be written ({error.strerror}).") from error


def add_samples(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the samples, and how the model runs on them."""
    parser.add_argument("--text", type=Path, help="records with `text`")
    parser.add_argument("--vqa", type=Path, help="records with `image`, `question`, `answer`, `kind`")
    parser.add_argument("--image-root", type=Path, default=Path("."), help="folder of the images in --vqa")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per forward pass (default: %(default)s)")
    parser.add_argument(
        "--float32", action="store_true", help="run in float32 (default: in the precision of the training)"
    )


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the language tasks."""
    group = parser.add_argument_group("language tasks (lm-evaluation-harness)")
    group.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="`smar`, or names of the harness's tasks")
    group.add_argument("--tasks-data", type=Path, help="folder with the data sets, ORG/NAME as on the hub")
    group.add_argument("--task-files", type=Path, help="folder with further task files in the harness's format")
    group.add_argument("--num-fewshot", type=int, help="examples per prompt, for tasks outside the preset")
    group.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="prompts as conversations or not (default: as the preset says)",
    )
    group.add_argument(
        "--allow-code-execution", action="store_true", help="run code that the model wrote (HumanEval, MBPP)"
    )
    group.add_argument(
        "--export", type=Path, help="folder of an export or of another model, for the harness's `hf` model"
    )


def add_benchmarks(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the multimodal benchmarks."""
    group = parser.add_argument_group("multimodal benchmarks")
    group.add_argument("--benchmarks", nargs="+", default=[], metavar="NAME", help=", ".join(BENCHMARKS))
    group.add_argument("--benchmarks-data", type=Path, help="folder with a folder for each benchmark, of its name")
    group.add_argument(
        "--predictions", type=Path, help="folder for the predictions (default: --output without .json, resumed)"
    )
    parser.add_argument("--limit", type=int, help="samples of each task and benchmark, for trials (default: all)")


def read_records(options: argparse.Namespace) -> None:
    """Reads --text and --vqa, each a JSON list or JSON lines, before anything is loaded."""
    try:
        options.texts = read_texts(options.text) if options.text else []
        options.questions = read_questions(options.vqa, options.image_root) if options.vqa else []
    except ValueError as error:
        fail(error)


def read_benchmark_files(options: argparse.Namespace) -> None:
    """Reads the tasks and benchmarks, before anything is loaded; the harness's tasks on rank 0 alone."""
    try:
        if options.benchmarks and options.benchmarks_data is None:
            raise ValueError("--benchmarks needs --benchmarks-data, the folder with a folder for each of them.")
        options.read = read_benchmarks(options.benchmarks, options.benchmarks_data, options.limit)
        options.loaded = None
        if options.tasks and int(os.environ.get("RANK", 0)) == 0:
            options.loaded = load_tasks(
                LanguageConfig(
                    tuple(options.tasks),
                    options.tasks_data,
                    options.allow_code_execution,
                    options.num_fewshot,
                    options.chat_template,
                    options.limit,
                    options.task_files,
                )
            )
            print(options.loaded.table(), flush=True)
    except ValueError as error:
        fail(error)


def measure(options: argparse.Namespace, evaluator: Evaluator, encoder: HeldOutEncoder) -> None:
    """Measures everything that the options ask for, and writes the results after each part."""
    results: dict[str, Any] = {}

    def add(part: dict[str, Any]) -> None:
        results.update(part)
        if dist.get_rank() == 0:
            write_results(options.output, results, part)

    if options.texts:
        samples = [encoder.passage(str(r.get("id", i)), r) for i, r in enumerate(options.texts)]
        scores = evaluator.score(samples, "text")
        add({"text_perplexity": perplexity(scores), "word_accuracy": word_completion(scores)})
    if options.questions:
        add(measure_vqa(options, evaluator, encoder))
    if options.tasks:
        add(measure_tasks(options, evaluator))
    if options.read:
        folder = options.predictions or options.output.with_suffix("")
        runner = BenchmarkRunner(evaluator, encoder, folder, identity())
        found: dict[str, Any] = {}
        for read in options.read:
            found[read.name] = runner.run(read)
            add({"benchmarks": found})


def identity() -> dict[str, Any]:
    """Returns what the predictions depend on: those of another checkpoint or with another setting are not resumed."""
    args = get_args()
    found = locate("--load", args.load, args.ckpt_step).checkpoint
    settings = "conversation_template seq_length min_tiles max_tiles use_thumbnail max_position_embeddings".split()
    return {
        "load": str(args.load),
        "iteration": args.iteration,
        "written": max((file.stat().st_mtime_ns for file in found.iterdir()), default=0) if found else 0,
        "dtype": str(args.params_dtype),
        **{name: getattr(args, name) for name in settings},
    }


def measure_tasks(options: argparse.Namespace, evaluator: Evaluator) -> dict[str, Any]:
    """Runs the language tasks; the results are on rank 0."""
    from megatron_smar.evaluation.language.harness import Ranks, TrainedModel, run_tokenizer

    args, tokenizer = get_args(), run_tokenizer(get_args())
    ranks = Ranks(evaluator, tokenizer.fast)
    if dist.get_rank() > 0:
        ranks.serve()
        return {}
    model = TrainedModel(ranks, tokenizer, args.max_position_embeddings)
    try:
        model.check(options.loaded)
        results = options.loaded.run(model)
    finally:
        ranks.release()
    print(format_results(results), flush=True)
    return {KEY: results.as_dict()}


def measure_vqa(options: argparse.Namespace, evaluator: Evaluator, encoder: HeldOutEncoder) -> dict[str, Any]:
    """Measures the accuracy by kind of question and the routing, and generates some answers."""
    items = options.questions
    samples = [encoder.question(item, options.image_root) for item in items]
    with recorded_routing([evaluator.model]) as recorder:
        scores = evaluator.score(samples, "visual questions")
    kinds = defaultdict(list)
    for item, score in zip(items, scores, strict=True):
        kinds[item.get("kind", "all")].append(score)
    shown = items[: options.examples]
    prompts = [encoder.question(item, options.image_root, answered=False) for item in shown]
    ends = encoder.end_ids
    answers = generate(evaluator, prompts, [8] * len(prompts), lambda _, new: new[-1] in ends, "answers")
    texts = [encoder.answer(ids) for ids in answers]
    routing = routing_result(recorder, encoder)
    return {
        "vqa_accuracy": exact_match(scores),
        "vqa_by_kind": {k: {"accuracy": exact_match(v), "count": len(v)} for k, v in sorted(kinds.items())},
        "mrd_distance_by_layer": list(routing["mrd_distance_by_layer"].values()),
        "expert_share": {name: list(shares.values()) for name, shares in routing["expert_share"].items()},
        "examples": [item | {"prediction": text} for item, text in zip(shown, texts, strict=True)],
    }


def load_model(options: argparse.Namespace, flags: list[str]) -> tuple[Evaluator, HeldOutEncoder]:
    """Loads the checkpoint that the flags name.

    Args:
        options: Options of a program that runs a model; `questions`, `float32` and `batch_size` are read.
        flags: The flags of pretrain_vlm.py among the program's own.
    """
    try:
        defaults = RUN | stored_flags(flags, asks=bool(options.questions or getattr(options, "benchmarks", ())))
        defaults |= {"bf16": False, "fp16": False} if options.float32 else {}
    except ValueError as error:
        fail(error)
    only_run = ["--skip-train", "--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint"]
    model, _, _ = start([*flags, *only_run], defaults)
    evaluator, encoder = run_evaluator(model, options.batch_size)
    evaluator.continues_word = encoder.continues_word()
    return evaluator, encoder


def evaluate_export(options: argparse.Namespace) -> None:
    """Runs the language tasks on an export with the harness's own model, and writes the results."""
    from megatron_smar.evaluation.language.export import open_export

    try:
        results = options.loaded.run(open_export(options.export, options.batch_size))
    except ValueError as error:
        fail(error)
    print(format_results(results))
    write_results(options.output, {KEY: results.as_dict()}, {})


def write_results(path: Path, results: dict[str, Any], new: dict[str, Any]) -> None:
    """Writes the results, and prints the numbers among the new ones."""
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, value in new.items():
        if isinstance(value, float):
            print(f"{name:24} {value:.4f}")
    for name, result in list(new.get("benchmarks", {}).items())[-1:]:
        skipped = f", {len(result['skipped'])} skipped" if result["skipped"] else ""
        skipped += f", {result['unfinished']} ended by the token limit" if result["unfinished"] else ""
        print(f"{result['title']} ({name}): {result['asked']} answers{skipped}, {result['version']}")
        for metric, value in result["metrics"].items():
            print(f"    {metric:24} {value:.2f}")
        for sample in result["skipped"][:10]:
            print(f"    skipped {sample['key']}: {sample['reason']}")


def main() -> None:
    """Loads the checkpoint, measures, and writes the results."""
    options, flags = parse()
    read_records(options)
    read_benchmark_files(options)
    if options.export:
        evaluate_export(options)
        return
    try:
        evaluator, encoder = load_model(options, flags)
        measure(options, evaluator, encoder)
    except ValueError as error:  # a sample that is too long, a task that asks too much of the model
        fail(error)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
