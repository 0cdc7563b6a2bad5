# SPDX-License-Identifier: Apache-2.0
"""Published weights through this project: SmolLM2-135M is imported, upcycled as by MoE-LLaVA, trained and evaluated.

    python examples/smollm2_moe/run.py [--quick | --full] [--output runs/smollm2] [--write FILE]

Stage 3, which trains experts and routers only, runs in three variants from one checkpoint: with SMAR's loss, with the
load balancing loss alone, and with neither. The table at the end compares language scores before and after, answers to
questions about pictures, and the distance between the modalities' routing, as the paper's Table 3.
Steps that are done are not repeated; an interrupted stage resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "examples" / "emoji_tiny")]

from megatron_smar import runtime

runtime.install_or_exit("cpu")  # this process only parses flags and reads results

import outcome
from documents import replace_between_marks
from recipe import START, Recipe, variants
from sources import SourceError
from steps import StepError

from megatron_smar.report.numbers import duration, percent

PROGRAM = "python examples/smollm2_moe/run.py"


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few steps and samples, to try the programs")
    size.add_argument("--full", action="store_true", help="the length for a GPU (MEGATRON_SMAR_DEVICE=cuda)")
    parser.add_argument("--output", type=Path, help="results (default: runs/smollm2, with --quick runs/smollm2-quick)")
    parser.add_argument("--cache", type=Path, default=Path("runs/sources"), help="packages (default: %(default)s)")
    parser.add_argument("--language", type=Path, help="folder of a language model to use instead of SmolLM2")
    parser.add_argument("--without-tasks", action="store_true", help="leave out the language benchmarks")
    parser.add_argument("--any-code", action="store_true", help="keep results that another version of the code made")
    parser.add_argument("--write", type=Path, metavar="FILE", help="document to write the table into, between marks")
    return parser


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Returns the recipe that the options ask for."""
    size = "quick" if options.quick else "gpu" if options.full else "cpu"
    name = {"quick": "smollm2-quick", "cpu": "smollm2", "gpu": "smollm2-full"}[size]
    return Recipe(
        options.output or Path("runs") / name,
        options.cache,
        options.quick,
        options.any_code,
        size=size,
        language=options.language,
        with_tasks=not options.without_tasks,
    )


def compare_language(recipe: Recipe) -> tuple[dict[str, object] | None, str]:
    """Compares the language scores before and after; returns retention.py's numbers and its tables in Markdown."""
    if not recipe.with_tasks:
        return None, ""
    folder = recipe.output / "results"
    files = {kind: folder / f"retention.{ending}" for kind, ending in (("json", "json"), ("markdown", "md"))}
    after = [f"{name}={recipe.results_file(name)}" for name in variants()]
    command = ["tools/retention.py", "--before", recipe.results_file(START), "--after", *after]
    written = ["--json", files["json"], "--markdown", files["markdown"], "--figure", folder / "retention.png"]
    recipe.program(recipe.log("retention"), *command, *written)
    return json.loads(files["json"].read_text(encoding="utf-8")), files["markdown"].read_text(encoding="utf-8")


def notes_of(recipe: Recipe, command: str) -> list[str]:
    """Returns what a reader of the table must know, in sentences."""
    stage3 = [recipe.steps[f"stage3_{name}"] for name in variants()]
    asked = recipe.sizes["evaluation"]["limit"]
    spent = duration(sum(step.seconds for step in recipe.steps.values()))
    trained = ", ".join(duration(step.seconds) for step in stage3)
    limit = f" {asked} questions of each language benchmark." if recipe.with_tasks else ""
    notes = [f"`{command}`. One run of each, seed 1234.{limit} Stage 3 took {trained}; all steps {spent}."]
    if recipe.with_tasks:
        tasks = json.loads(recipe.scores_files()[0].read_text(encoding="utf-8"))["language"]["tasks"]
        scores = ", ".join(f"{task['title']} {percent(task['score'])}" for task in tasks.values())
        number = recipe.sizes["harness"]["limit"]
        notes.append(
            f"The published model in transformers and its import have the same scores on {number} questions of each: "
            f"{scores}."
        )
    return notes


def report(recipe: Recipe, command: str, document: Path | None) -> None:
    """Writes and prints the table."""
    table, details = compare_language(recipe)
    rows = outcome.make_rows({name: recipe.results(name) for name in (START, *variants())}, START, table)
    notes = notes_of(recipe, command)
    outcome.write(rows, notes, details, recipe.output / "results")
    print(f"\n{outcome.terminal(rows, notes)}\n\n{recipe.output / 'results'}: results.json, results.md, results.png")
    if document is not None:
        replace_between_marks(document, outcome.markdown(rows, notes, details), outcome.MARKS)


def main() -> None:
    """Runs the command line."""
    parser = make_parser()
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--write takes the results of full runs: leave out --quick")
    if options.full and os.environ.get("MEGATRON_SMAR_DEVICE", "cpu") == "cpu":
        parser.error("--full is for a GPU, on the CPU it takes days: set MEGATRON_SMAR_DEVICE=cuda, or leave it out")
    for name in ("output", "cache", "language", "write"):
        given = getattr(options, name)
        if given is not None and given != parser.get_default(name):
            setattr(options, name, given.resolve())  # the user's folder; defaults are the project's
    os.chdir(ROOT)
    shown = [f"--{name.replace('_', '-')}" for name in ("quick", "full", "without_tasks") if getattr(options, name)]
    try:
        recipe = recipe_of(options)
        recipe.run()
        report(recipe, " ".join([PROGRAM, *shown]), options.write)
    except (SourceError, StepError, ValueError) as error:
        sys.exit(f"smollm2: {error}")


if __name__ == "__main__":
    main()
