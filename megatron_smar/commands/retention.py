# SPDX-License-Identifier: Apache-2.0
r"""Compares language scores after training with those before it: the paper's Table 2, with standard errors.

    tools/retention.py --before before.json --after SMAR=smar.json balance=balance.json \
        [--tasks mmlu bbh ...] [--json table.json] [--markdown table.md] [--figure table.png]

The files are results of evaluate.py --tasks. Each task must have been asked in the same way in all of them: version,
examples, questions, metric. The retention of a task is score after / score before, that of the average mean after /
mean before. HumanEval and IFEval are shown but not averaged, as in the paper, unless --tasks names them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_smar.evaluation.language.results import LanguageResults, ResultsError, read_results
from megatron_smar.evaluation.language.retention import retention
from megatron_smar.evaluation.language.retention_table import format_retention, markdown, write_figure


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="FILE", help="results before the training")
    parser.add_argument(
        "--after",
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        help="results after it, of one or more models. Without NAME=: the file's name, its folder's for results.json",
    )
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="tasks to compare and to average. Default: see above"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write the figure: .png, .svg or .pdf")
    return parser


def named_files(arguments: list[str]) -> dict[str, Path]:
    """Returns the files of --after by the names in the table.

    Raises:
        ResultsError: Two have the same name.
    """
    files: dict[str, Path] = {}
    for argument in arguments:
        name, separator, file = argument.partition("=") if not Path(argument).exists() else (argument, "", "")
        path = Path(file if separator else argument)
        if not separator:
            name = path.resolve().parent.name if path.name == "results.json" else path.stem
        if name in files:
            raise ResultsError(f"--after has two results of the name {name}; name them: --after NAME=FILE.")
        files[name] = path
    return files


def write(path: Path | None, text: str) -> None:
    """Writes a text file, if its path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Reads the results and writes the table; a user's mistake ends it with one sentence."""
    parser = build_parser()
    options = parser.parse_args()
    try:
        after: dict[str, LanguageResults] = {
            name: read_results(path) for name, path in named_files(options.after).items()
        }
        table = retention(read_results(options.before), after, options.tasks)
        if options.figure:
            write_figure(options.figure, table)
    except ValueError as error:  # also matplotlib's, of a file ending that it does not know
        parser.error(str(error))
    write(options.json, json.dumps(table.as_dict(), indent=1) + "\n")
    write(options.markdown, markdown(table))
    print(format_retention(table))
    sys.exit(0)


if __name__ == "__main__":
    main()
