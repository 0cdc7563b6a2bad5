# SPDX-License-Identifier: Apache-2.0
"""The comparison of several runs: comparison.html, comparison.json, figures as PNG and SVG, and a table."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_smar.config.run_file import saved_folder
from megatron_smar.report import comparison_sections as sections
from megatron_smar.report.html import document, tag
from megatron_smar.report.numbers import aligned, plain
from megatron_smar.report.results import read_results
from megatron_smar.report.run import RESULTS_FILE, Run, read_run
from megatron_smar.report.scalars import Series
from megatron_smar.report.scores import columns
from megatron_smar.report.sections import DEFINITIONS, terms
from megatron_smar.report.style import save

_BEST = re.compile(r"(\S+(?: ± \S+)?)\*")


def read_runs(given: Sequence[str]) -> list[Run]:
    """Reads the runs of a comparison.

    Args:
        given: Of each run: its folder, its run.yaml or a results file of evaluate.py, as PATH or NAME=PATH.

    Raises:
        ValueError: A path is none of these or cannot be read, or two runs have the same name.
    """
    runs = [_read(entry) for entry in given]
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise ValueError(f"Several runs are named {twice[0]}: give them other names, as NAME=PATH.")
    return runs


def _read(given: str) -> Run:
    name, equals, rest = given.partition("=")
    path = Path(given)
    if path.exists() or not equals:
        return _read_path(path)
    if not name or not rest:
        raise ValueError(f"{given} is not NAME=PATH: a name or a path is missing.")
    return replace(_read_path(Path(rest)), name=name)


def _read_path(path: Path) -> Run:
    if path.is_dir():
        return read_run(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a run's folder or a results file of evaluate.py.")
    if path.suffix in (".yaml", ".yml"):
        return read_run(saved_folder(path))
    name = path.resolve().parent.name if path.name == RESULTS_FILE else path.stem
    return Run(name, None, {}, Series([], []), after=read_results(path))


def write_comparison(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Writes the page, its data and the figures; returns their paths, the page's first.

    Raises:
        ValueError: None of the runs has data that are compared.
    """
    parts = [part(runs) for part in (sections.scores, sections.distances, sections.experts, sections.training)]
    if not any(parts):
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"There is nothing to compare: no logged loss, scores or routing in {names}.")
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "comparison.html", folder / "comparison.json"
    title = f"Comparison of {', '.join(run.name for run in runs)}"
    header = tag("header", tag("h1", title))
    page.write_text(document(title, [header, *parts, terms(DEFINITIONS)]), encoding="utf-8")
    content = {
        "notes": sections.notes(runs),
        "runs": {
            run.name: {
                "band": run.band,
                "results": run.after and run.after.content,
                "training": {name: run.scalars[name]._asdict() for name in sections.TRAINING if name in run.scalars},
            }
            for run in runs
        },
    }
    data.write_text(json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    figures = [path for stem, figure in sections.files(runs) for path in save(figure, folder / stem)]
    return [page, data, *figures]


def format_comparison(runs: Sequence[Run], width: int, bold: bool) -> str:
    """Returns the scores as tables for the terminal, with what the reader must know below.

    Args:
        runs: The runs.
        width: Width of the terminal; a table that is wider is continued below.
        bold: Whether the best score of a column is bold; otherwise it is marked with *.
    """
    shown = [
        [column.title, *(column.cell(run.name) + ("*" if run.name in column.best else " ") for run in runs)]
        for column in columns(sections.results(runs))
    ]
    names = ["", *(run.name for run in runs)]
    parts = [
        "\n".join(aligned(list(zip(names, *block, strict=True)), left=(0,))) for block in _blocks(names, shown, width)
    ]
    text = "\n\n".join([*parts, "\n".join(sections.notes(runs))]).strip()
    if not bold:
        return text + (
            "\n* the best of its column" if any("*" in cell for cells in shown for cell in cells[1:]) else ""
        )
    return _BEST.sub("\033[1m\\1\033[0m ", text)


def _blocks(names: Sequence[str], shown: Sequence[list[str]], width: int) -> list[list[list[str]]]:
    """Divides columns into tables that fit the width, each with at least one column."""
    blocks: list[list[list[str]]] = []
    used = width
    for cells in shown:
        needed = max(map(len, cells)) + 2
        if used + needed > width or not blocks:
            blocks.append([])
            used = max(map(len, names))
        blocks[-1].append(cells)
        used += needed
    return blocks
