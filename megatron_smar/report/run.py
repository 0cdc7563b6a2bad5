# SPDX-License-Identifier: Apache-2.0
"""The report of any run of `pretrain_vlm.py`, from the files in its folder: report.json, report.html and a table."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megatron_smar.checkpoint.metadata import find_checkpoint, run_arguments
from megatron_smar.config.run_file import flag_parser
from megatron_smar.data.rejects import read_rejects
from megatron_smar.report import figures, sections
from megatron_smar.report.benchmarks import benchmarks
from megatron_smar.report.html import Markup, document, drawing, section, table, tag
from megatron_smar.report.numbers import aligned, decimal, duration, percent, plain
from megatron_smar.report.results import Results, read_results
from megatron_smar.report.scalars import Series, read_last_images, read_scalars, read_step_seconds
from megatron_smar.report.scores import Column, columns
from megatron_smar.routing.strategies import STRATEGIES

RESULTS_FILE = "results.json"  # of evaluate.py, in the run's folder
# Arguments that a run sets itself, which are not settings.
_STATE = (
    "iteration",
    "curr_iteration",
    "consumed_",
    "skipped_",
    "num_floating_point",
    "origin",
    "vision_tower",
    "rank",
)
DEFINITIONS = {
    "First and last": "Means over the first and the last twentieth of the logged points, at least one.",
    "Seconds per step": "From the times at which the run logged its loss; the start of each run is left out.",
    **sections.DEFINITIONS,
}


@dataclass(frozen=True)
class Run:
    """The data of a run's report.

    Attributes:
        name: Name of the run's folder.
        arguments: Megatron's and this project's arguments, as stored in the checkpoint; None without a checkpoint.
        scalars: Logged scalars by tag.
        step_seconds: Seconds per step.
        load_maps: The last heat map of the experts' load by modality, PNG.
        rejected: Number of skipped samples by reason.
        before: Results of evaluate.py before the run; None if there are none.
        after: Results of evaluate.py after the run; None if there are none.
        image_root: Folder that the results' image paths are relative to; None leaves the images out.
    """

    name: str
    arguments: Namespace | None
    scalars: Mapping[str, Series]
    step_seconds: Series
    load_maps: Mapping[str, bytes] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    before: Results | None = None
    after: Results | None = None
    image_root: Path | None = None

    @property
    def band(self) -> tuple[float, float] | None:
        """The band of the SMAR loss; None if the strategy has no band, or the arguments are not known."""
        name = getattr(self.arguments, "modality_routing", None)
        if name not in STRATEGIES or self.arguments is None:
            return None
        config = STRATEGIES[name].from_arguments(self.arguments)
        ends = (getattr(config, "d_min", None), getattr(config, "d_max", None))
        return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])


def read_run(
    folder: Path,
    tensorboard: Path | None = None,
    results: Path | None = None,
    before: Path | None = None,
    image_root: Path | None = None,
) -> Run:
    """Reads a run's folder. It must have event files, unless there are results of evaluate.py.

    Args:
        folder: The run's --save or --tensorboard-dir.
        tensorboard: The run's --tensorboard-dir; only needed if it is neither the folder, nor `tensorboard` in it, nor
            the --tensorboard-dir in the checkpoint.
        results: File with results of evaluate.py after the run; by default results.json in the folder, if it exists.
        before: File with results of evaluate.py before the run.
        image_root: Folder of the images, as for evaluate.py, to show the examples' images.

    Raises:
        ValueError: A folder or file is missing or cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the run's --save or --tensorboard-dir.")
    arguments = _arguments(folder)
    found = results or (folder / RESULTS_FILE if (folder / RESULTS_FILE).is_file() else None)
    logs = tensorboard or _event_folder(folder, arguments, is_optional=found is not None)
    rejects = getattr(arguments, "rejects_dir", None) or folder / "rejects"
    earlier, later = (None if path is None else read_results(path) for path in (before, found))
    if earlier and later:
        _check_sizes(earlier, later)
    return Run(
        folder.resolve().name,
        arguments,
        read_scalars(logs) if logs else {},
        read_step_seconds(logs) if logs else Series([], []),
        read_last_images(logs, "moe/load/") if logs else {},
        read_rejects(rejects) if Path(rejects).is_dir() else Counter(),
        earlier,
        later,
        image_root,
    )


def _check_sizes(before: Results, after: Results) -> None:
    sizes = [{title: routing.size for title, routing in found.routings.items()} for found in (before, after)]
    for title in sizes[0].keys() & sizes[1].keys():
        if sizes[0][title] != sizes[1][title]:
            layers, experts = zip(sizes[0][title], sizes[1][title], strict=True)
            raise ValueError(
                f"The results before and after the run are of models of different sizes ({title}: {layers[0]} and "
                f"{layers[1]} MoE layers, {experts[0]} and {experts[1]} experts): give --before of the same model."
            )


def _arguments(folder: Path) -> Namespace | None:
    try:
        find_checkpoint(folder)
    except ValueError:  # a folder with logs only
        return None
    return run_arguments(folder)


def _event_folder(folder: Path, arguments: Namespace | None, is_optional: bool) -> Path | None:
    named = getattr(arguments, "tensorboard_dir", None)
    places = [folder, folder / "tensorboard", *([Path(named)] if named else [])]
    for place in places:
        if next(place.glob("*.tfevents.*"), None) is not None:
            return place
    if is_optional:
        return None
    looked = ", ".join(map(str, places))
    raise ValueError(
        f"{folder} holds no TensorBoard event files (looked in {looked}) and no {RESULTS_FILE}: give the folder of a "
        "run, or for the report of one run its --tensorboard-dir."
    )


def _read_results(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as results of evaluate.py ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not an object with results of evaluate.py.")
    return found


def write_run_report(run: Run, folder: Path) -> tuple[Path, Path]:
    """Writes report.json (settings, numbers, all scalars) and report.html; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "name": run.name,
        "settings": changed_settings(run.arguments),
        "summary": [dict(zip(("measure", "first", "last"), row, strict=True)) for row in summary_rows(run)],
        "history": _history(run),
        "step_seconds": run.step_seconds._asdict(),
        "rejected": dict(run.rejected),
        "before": run.before and run.before.content,
        "after": run.after and run.after.content,
    }
    report, page = folder / "report.json", folder / "report.html"
    report.write_text(json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page.write_text(render(run), encoding="utf-8")
    return report, page


def format_summary(run: Run) -> str:
    """Returns the summary as a table for the terminal."""
    return "\n".join([run.name, "", *aligned([("", "first", "last"), *summary_rows(run)], left=(0,))])


def summary_rows(run: Run) -> list[tuple[str, str, str]]:
    """Returns rows (measure, first, last): values logged at the run's start and end, and evaluation results."""
    own = STRATEGIES[name].metrics if (name := getattr(run.arguments, "modality_routing", None)) in STRATEGIES else ()
    wanted = ["lm loss", "lm loss validation", *(metric.name for metric in own), "mrd distance", "msi", "grad-norm"]
    rows = [_row(name, run.scalars[name].values, decimal) for name in wanted if name in run.scalars]
    if run.step_seconds.values:
        rows.append(_row("seconds per step", run.step_seconds.values, "{:.3g}".format))
    logged = [(name, run.scalars.get(f"throughput/{tag}")) for tag, name in _RATES.items()]
    rows += [(f"{name}, median", "", f"{median(series.values):.4g}") for name, series in logged if series]
    rows += [(title, _number(run.before, key, form), _number(run.after, key, form)) for title, key, form in _MEASURES]
    accuracies = [results.get("word_accuracy") for results in (run.before, run.after) if results]
    if len(accuracies) == 2 and None not in accuracies:
        rows.append(("retention", "", percent(accuracies[1] / accuracies[0])))
    scored = columns({when: results for when, results in _moments(run) if results})
    rows += [
        (column.title, _cell(column, run.before, "before"), _cell(column, run.after, "after")) for column in scored
    ]
    rows.append(("skipped samples", "", f"{sum(run.rejected.values()):,}"))
    return [row for row in rows if row[1] or row[2]]


# Tags of `monitoring.throughput` -> their names here.
_RATES = {
    "tokens_per_second": "tokens per second",
    "samples_per_second": "samples per second",
    "tiles_per_second": "tiles per second",
    "model_tflops": "model TFLOP/s per device",
    "mfu": "MFU",
}
_MEASURES = (
    ("text perplexity", "text_perplexity", decimal),
    ("word accuracy", "word_accuracy", percent),
    ("picture questions", "vqa_accuracy", percent),
)


def _number(results: Results | None, key: str, form: Any) -> str:
    return form(results.content[key]) if results and key in results.content else ""


def _cell(column: Column, results: Results | None, when: str) -> str:
    return column.cell(when) if results else ""


def _moments(run: Run) -> tuple[tuple[str, Results | None], ...]:
    return (("before", run.before), ("after", run.after))


def _row(name: str, values: Sequence[float], form: Callable[[float], str]) -> tuple[str, str, str]:
    first, last = _ends(values)
    return name, form(first), form(last)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    share = max(1, len(values) // 20)
    return fmean(values[:share]), fmean(values[-share:])


def changed_settings(arguments: Namespace | None) -> dict[str, dict[str, Any]]:
    """Returns the run's arguments that differ from the parser's defaults, by the parser's group."""
    if arguments is None:
        return {}
    parser = flag_parser()
    groups: dict[str, dict[str, Any]] = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            value = getattr(arguments, action.dest, action.default)
            state = action.dest.startswith(_STATE) or value is None
            if not state and str(value) != str(parser.get_default(action.dest)):
                groups.setdefault(str(group.title), {})[action.dest] = value
    return groups


def render(run: Run) -> str:
    """Returns the HTML page of a run."""
    after = run.after or Results()
    earlier, later = (run.before or Results()).held_out, after.held_out
    return document(
        run.name,
        [
            _header(run),
            sections.distances(
                _history(run),
                run.band,
                list(earlier.distances.values()) or None,
                list(later.distances.values()) or None,
                "training",
            ),
            sections.experts(earlier.shares or None, later.shares) if later.shares else Markup(),
            benchmarks(run.before, run.after, run.band),
            sections.load(_history(run), run.load_maps),
            sections.losses({"training": _history(run)}, {"training": "Training"}),
            _throughput(run),
            _skipped(run),
            sections.questions(after.get("vqa_by_kind", {}), "Accuracy after training"),
            sections.examples(list(_examples(run))),
            sections.settings(changed_settings(run.arguments)),
            sections.terms(DEFINITIONS),
        ],
    )


def _history(run: Run) -> dict[str, Any]:
    return {name: series._asdict() for name, series in run.scalars.items()}


def _header(run: Run) -> Markup:
    strategy = getattr(run.arguments, "modality_routing", None)
    text = f"{max(run.scalars['lm loss'].steps):,} steps" if "lm loss" in run.scalars else "No logged steps"
    text += f" with --modality-routing {strategy}" if strategy else ""
    if run.step_seconds.values:
        text += f", {duration(median(run.step_seconds.values))} a step (median)"
    shown = table(("", "First", "Last"), summary_rows(run), "headline")
    return tag("header", tag("h1", run.name), tag("p", f"{text}.", class_="summary"), shown)


def _throughput(run: Run) -> Markup:
    shown = {"seconds per step": run.step_seconds}
    shown |= {name: series for tag, name in _RATES.items() if (series := run.scalars.get(f"throughput/{tag}"))}
    images = []
    for name, series in shown.items():
        if series.values:
            place, title = name.replace(" ", "-").replace("/", "-"), name[0].upper() + name[1:]
            images.append(drawing(figures.over_training(*series, name), place, title, ""))
    return section("Throughput", tag("div", *images, class_="two")) if images else Markup()


def _skipped(run: Run) -> Markup:
    if not run.rejected:
        return Markup()
    rows = [(reason, f"{count:,}") for reason, count in sorted(run.rejected.items(), key=lambda item: -item[1])]
    return section("Skipped samples", table(("Reason", "Samples"), rows))


def _examples(run: Run) -> Iterator[dict[str, Any]]:
    for item in run.after.get("examples", ()) if run.after else ():
        images = item.get("image") or []
        yield {
            "image": run.image_root / images[0] if run.image_root is not None and images else None,
            "question": item["question"].replace("<image>\n", ""),
            "answer": item["answer"],
            "prediction": item["prediction"],
            "correct": item["prediction"] == item["answer"],
        }
