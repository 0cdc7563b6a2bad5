# SPDX-License-Identifier: Apache-2.0
"""Compares routing strategies: stage 2 of the demo under each of them, from one checkpoint, with one seed.

    python examples/emoji_tiny/compare.py [--variants none smar hard] [--output runs/compare] [--write FILE]

Runs what `run.py --routing NAME` runs, for each variant in strategies.yaml and each strategy of --modality-routing, and
keeps the results where run.py does; a variant that is done is not run again. Writes compare.json, compare.md and
compare.png, and with --write the table into a document, between two marks.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from megatron_smar import runtime

runtime.install_or_exit("cpu")  # this process only parses flags and reads results

from comparison import MARKS, markdown_table, rows_of, terminal_table, write_comparison
from demo_content import content
from demo_report import write_report
from documents import replace_between_marks
from run import parser_of
from stages import Demo, VariantRun, time_left
from steps import StepError
from variants import Variant, find_variant, settings, variants

PROGRAM = "python examples/emoji_tiny/compare.py"


def run_all(demo: Demo, wanted: Sequence[Variant]) -> tuple[list[VariantRun], list[str]]:
    """Runs all variants, each with its own report; one that fails does not keep the others from running.

    Returns:
        The variants that are done, and a sentence for each that failed.
    """
    demo.prepare()
    runs = [VariantRun(demo, variant) for variant in wanted]
    done: list[VariantRun] = []
    failures: list[str] = []
    for number, run in enumerate(runs):
        left = sum(not later.is_done for later in runs[number:])
        print(f"\n{run.variant.label}: {number + 1} of {len(runs)}{time_left(done, left)}", flush=True)
        try:
            done.append(run.run().place())
        except StepError as error:
            failures.append(f"{run.variant.label}: {error}")
            continue
        write_report(content(demo, run), run.folder)
    return done, failures


def main() -> None:
    """Runs the command line."""
    known = variants()
    parser = parser_of(__doc__)
    parser.add_argument("--base", type=Path, default=Path("runs/demo"), help="the demo's folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="results (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", default=list(known), help="default: %(default)s")
    parser.add_argument("--write", type=Path, metavar="FILE", help="document to write the table into, between marks")
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--write takes the results of full runs: leave out --quick")
    for name in ("base", "cache", "output", "write"):
        given = getattr(options, name)
        if given is not None and given != parser.get_default(name):
            setattr(options, name, given.resolve())  # the user's folder; defaults are the project's
    os.chdir(ROOT)
    try:
        wanted = [find_variant(name) for name in dict.fromkeys(options.variants)]
        demo = Demo(options.base, options.cache, options.quick, options.any_code)
        done, failures = run_all(demo, wanted)
    except (StepError, ValueError) as error:
        sys.exit(f"compare: {error}")
    if done:
        document = None if failures else options.write  # a table with gaps would hide that some failed
        _write(done, options.output, document, [PROGRAM, *_shown(options, list(known))])
    if failures:
        sys.exit("\n".join(["", *(f"compare: {failure}" for failure in failures)]))


def _shown(options: Namespace, known: Sequence[str]) -> list[str]:
    """Returns the flags that decide what the table has."""
    switches = [f"--{name.replace('_', '-')}" for name in ("quick", "any_code") if getattr(options, name)]
    chosen = list(options.variants)
    return switches + ([] if chosen == list(known) else ["--variants", *chosen])


def _write(done: Sequence[VariantRun], output: Path, document: Path | None, command: Sequence[str]) -> None:
    rows, seed, line = rows_of(done), settings("optimizer")["seed"], " ".join(command)
    write_comparison(rows, seed, line, output)
    print(f"\n{terminal_table(rows, seed)}\n\n{output}: compare.json, compare.md, compare.png")
    if document is not None:
        try:
            replace_between_marks(document, markdown_table(rows, seed, line), MARKS)
        except ValueError as error:
            sys.exit(f"compare: {error}")


if __name__ == "__main__":
    main()
