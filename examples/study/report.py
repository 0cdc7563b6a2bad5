# SPDX-License-Identifier: Apache-2.0
"""Draws the study's results: tables on the terminal and in docs/study/README.md, figures in docs/study.

    python examples/study/report.py [--write docs/study/README.md] [--smollm2]

What has no results yet is left out, and the number of runs that are missing or failed is always shown.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(Path(__file__).parents[1] / "emoji_tiny")]

from megatron_smar import runtime

runtime.install_or_exit("cpu")  # the grid's flags are checked with Megatron's parser

from documents import replace_between_marks
from findings import BASELINE, HYPOTHESES, MEASURES, Results, Tried, choose, summary, tried, verdicts
from grid import MAIN, TUNING, add_places, read_grid, set_places
from paired import Interval
from study_figures import write_figures

from megatron_smar.report.numbers import aligned

MARKS = ("<!-- written by examples/study/report.py --write -->", "<!-- end of the results -->")
Table = list[tuple[str, ...]]


class Shown(NamedTuple):
    """A table of arms.

    Attributes:
        title: Its title.
        model: The model.
        arms: Its arms, in order.
        relative: Whether it has SMoES's columns, the changes relative to `none`; otherwise the measures themselves.
    """

    title: str
    model: str
    arms: tuple[str, ...]
    relative: bool = False


METHODS = ("none", "balance", "smar", "sqrt", "sqrt_smar", "smoes", "smoes_gaussian")
ROUTINGS = ("hard", "hard_6_2", "layer_split", "moiie", "label_ce", "modality_gates", "modality_balance", "ernie")
ABLATION = ("none", "smoes_8_binning", "smoes_8_hard", "smoes_8_kl", "smoes_8_fixed", "smoes_8")
RATES = ("none_lr_0005", "none_lr_00075", "none", "smar_lr_0005", "smar")
SHARES = tuple(f"{arm}{share}" for arm in ("none", "smar") for share in ("_text_0", "", "_text_6", "_text_20"))
SMALL = ("none", "balance", "hard", "moiie", "smar", "smoes_8")
TABLES = (
    Shown("Language retention by method (the SMAR paper's Table 2)", "large", METHODS + ROUTINGS),
    Shown("SMAR's band (Table 4)", "large", ("none", "smar_05", "smar_10", "smar_15", "smar")),
    Shown("SMAR's bias, and balance beside it (Table 5)", "large", ("smar_15_no_bias", "smar_15", "smar_15_balance")),
    Shown("Relative to none (SMoES's main table), 8 large experts", "large", METHODS + ROUTINGS, relative=True),
    Shown("Relative to none, 64 small experts", "small", SMALL, relative=True),
    Shown("SMoES's ablation, 64 small experts", "small", ABLATION, relative=True),
    Shown("64 small experts", "small", SMALL),
    Shown("Share of pure text", "large", SHARES),
    Shown("Learning rate", "large", RATES),
)


def parts(found: Interval, scale: float = 100, signed: bool = False) -> str:
    """Returns a mean with the half-width of its interval, in percent or points; with a scale of 1, as it is."""
    if math.isnan(found.mean):
        return "-"
    form = f"{'+' if signed else ''}.{1 if scale > 1 else 2}f"
    half = "" if math.isnan(found.low) else f" ± {scale * (found.high - found.mean):{form.lstrip('+')}}"
    return f"{scale * found.mean:{form}}{half}"


def arms_table(results: Results, shown: Shown) -> Table:
    """Returns a table of the measures; empty if none of its arms has results."""
    header = ("arm", "seeds", "retention %", "minus none", "at equal pictures", "perplexity ratio", "minus none")
    rows: Table = [(*header, "picture questions %", "minus none", "MSI", "distance", "load entropy", "crossing %")]
    for arm in _done(results, shown):
        own = {name: list(results.values(MAIN, shown.model, arm, name).values()) for name in MEASURES}
        mean = {name: statistics.fmean(found) for name, found in own.items()}
        language, perplexity, pictures = (
            (parts(summary(own[name]), scale), _minus_none(results, shown.model, arm, name, scale))
            for name, scale in (("retention", 100), ("perplexity", 1), ("pictures", 100))
        )
        rows.append(
            (
                *(arm, str(len(own["retention"])), *language, _at_equal_pictures(results, shown.model, arm)),
                *(*perplexity, *pictures, f"{mean['msi']:.2f}"),
                *(_distances(results, shown.model, arm), f"{mean['entropy']:.2f} ({mean['vision_entropy']:.2f})"),
                f"{100 * mean['crossing']:.1f} ({100 * mean['vision_crossing']:.1f})",
            )
        )
    return rows if len(rows) > 1 else []


def baseline_of(arm: str) -> str:
    """Returns the arm that is `none` with the same data and learning rate; empty if `none` read other data.

    Arms with another share of text are paired only with each other.
    """
    method, _, own = arm.partition("_")
    if own.startswith(("text", "lr")) and method != BASELINE:
        return f"{BASELINE}_{own}"
    return "" if arm == BASELINE or own.startswith("text") else BASELINE


def _minus_none(results: Results, model: str, arm: str, measure: str, scale: float) -> str:
    other = baseline_of(arm)
    return parts(summary(results.differences(MAIN, model, arm, other, measure)), scale, signed=True) if other else ""


def _at_equal_pictures(results: Results, model: str, arm: str) -> str:
    """Returns the mean over seeds, with their number where seeds are left out."""
    if arm.startswith(BASELINE) or "_text_" in arm:
        return ""
    found, seeds = results.at_equal_pictures(model, arm), len(results.of_arm(MAIN, model, arm))
    return parts(summary(found), signed=True) + (f" ({len(found)} seeds)" if 0 < len(found) < seeds else "")


def _distances(results: Results, model: str, arm: str) -> str:
    """Returns the mean distance, and that of the layers with the least and the greatest, means over seeds."""
    by_seed = [result["after"]["mrd_distance"] for result in results.of_arm(MAIN, model, arm).values()]
    layers = [statistics.fmean(layer) for layer in zip(*by_seed, strict=True)]
    return f"{statistics.fmean(layers):.2f} ({min(layers):.2f} to {max(layers):.2f})"


def relative_table(results: Results, shown: Shown) -> Table:
    """Returns SMoES's columns: MSI, and changes relative to `none`; empty if none of its arms has results."""
    rows: Table = [("arm", "seeds", "MSI", "pictures", "language", "overall")]
    for arm in _done(results, shown):
        msi = statistics.fmean(results.values(MAIN, shown.model, arm, "msi").values())
        change = {name: relative(results, shown.model, arm, name) for name in ("pictures", "retention")}
        overall = [(a + b) / 2 for a, b in zip(*change.values(), strict=True)]
        columns = [parts(summary(found), signed=True) + " %" for found in (*change.values(), overall)]
        rows.append((arm, str(len(results.of_arm(MAIN, shown.model, arm))), f"{msi:.3f}", *columns))
    return rows if len(rows) > 1 else []


def relative(results: Results, model: str, arm: str, measure: str) -> list[float]:
    """Returns a measure of each seed relative to that of `none` with the same seed, minus 1."""
    return [value / none - 1 for value, none in results.pairs(MAIN, model, arm, BASELINE, measure)]


def _done(results: Results, shown: Shown) -> list[str]:
    done = results.arms(MAIN, shown.model)
    return [arm for arm in shown.arms if arm in done]


def kinds_table(results: Results, shown: Shown) -> Table:
    """Returns the accuracy by kind of picture question; empty if none of its arms has results."""
    kinds: list[str] = []
    rows: Table = []
    for arm in _done(results, shown):
        by_seed = [result["after"]["vqa_by_kind"] for result in results.of_arm(MAIN, shown.model, arm).values()]
        kinds = kinds or list(by_seed[0])
        means = {kind: summary([found[kind] for found in by_seed]) for kind in kinds}
        rows.append((arm, str(len(by_seed)), *(parts(means[kind]) for kind in kinds)))
    return [("arm", "seeds", *(f"{kind} %" for kind in kinds)), *rows] if rows else []


def hypotheses_table(results: Results) -> Table:
    """Returns the verdicts; empty if there is none."""
    found = verdicts(results)
    header = ("", "hypothesis", "pairs", "difference", "± over passages", "picture questions")
    rows: Table = [(*header, "p (of H3 and H7: with the margin)", "Holm's p", "outcome")]
    for name, verdict in found.items():
        scale = 1 if HYPOTHESES[name].measure == "entropy" else 100
        shown = parts(verdict.difference, scale, signed=True) if scale > 1 else _plain(verdict.difference)
        pictures = parts(verdict.pictures, signed=True)
        sampling = "-" if math.isnan(verdict.sampling) else f"{100 * verdict.sampling:.1f}"
        numbers = (str(verdict.seeds), shown, sampling, pictures, f"{verdict.p:.3f}", f"{verdict.adjusted:.3f}")
        rows.append((name, HYPOTHESES[name].claim, *numbers, verdict.outcome))
    return rows if found else []


def _plain(found: Interval) -> str:
    return f"{found.mean:+.3f} ± {found.high - found.mean:.3f}"


def tuning_table(results: Results) -> Table:
    """Returns what the tuning tried, with the chosen value of each flag marked; empty without results."""
    settings = tried(results)
    header = ("model", "arm", "setting", "seeds", "retention %", "perplexity ratio", "picture questions %", "choice")
    rows: Table = [header]
    seeds = len(results.grid.tuning["seeds"])
    pictures = {s.model: s.pictures for s in settings if (s.arm, s.setting, s.seeds) == (BASELINE, "", seeds)}
    groups: dict[tuple[str, str, str], list[Tried]] = defaultdict(list)
    for each in settings:
        groups[each.model, each.arm, each.setting.partition(" ")[0]].append(each)
    for (model, _, flag), group in groups.items():
        whole = [each for each in group if each.seeds == seeds]  # a value that failed on a seed is not chosen
        is_done = flag and model in pictures and len(results.seeds_done(TUNING, model)) == seeds
        best = choose(whole, pictures[model]) if is_done and whole else None
        for each in group:
            numbers = (f"{100 * each.retention:.1f}", f"{each.perplexity:.2f}", f"{100 * each.pictures:.1f}")
            chosen = "chosen" if each is best else ""
            rows.append((model, each.arm, each.setting, str(each.seeds), *numbers, chosen))
    return rows if len(rows) > 1 else []


def tables(results: Results) -> list[tuple[str, Table]]:
    """Returns all tables that have results, with their titles."""
    found = [("Hypotheses", hypotheses_table(results))]
    found += [(s.title, relative_table(results, s) if s.relative else arms_table(results, s)) for s in TABLES]
    found.append(("Picture questions by kind", kinds_table(results, TABLES[0])))
    found.append(("Tuning, means over seeds of its own on the validation half", tuning_table(results)))
    return [(title, table) for title, table in found if table]


def state(results: Results) -> str:
    """Returns how many runs are done, missing and failed, and what a reader must know about them, in sentences."""
    lines = [f"Runs: {len(results.found)} done, {len(results.missing)} missing, {len(results.failed)} failed."]
    if len(results.codes) > 1:
        lines.append(f"They were made by {len(results.codes)} versions of the code.")
    if results.unpaired:
        lines.append(f"Not all arms of {', '.join(results.unpaired)} started from the same checkpoint.")
    repeated = sum("earlier_failures" in result for result in results.found.values())
    lines += [f"Done again after a failure: {repeated}."] if repeated else []
    return "\n".join([*lines, *(f"- {name}: {said}" for name, said in results.failed.items())])


def markdown(found: Iterable[tuple[str, Table]], figures: Sequence[tuple[str, str]], said: str) -> str:
    """Returns tables and figures in Markdown."""
    lines = [said, ""]
    for title, (header, *rows) in found:
        lines += [f"### {title}", "", _line(header), "|---" * len(header) + "|", *map(_line, rows), ""]
    for title, name in figures:
        lines += [f"### {title}", "", f"![{title}]({name})", ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="document to write into; figures go beside it")
    add_places(parser, "grid", "results")
    options = parser.parse_args()
    set_places(options)
    if options.write:
        options.write = options.write.resolve()
    os.chdir(ROOT)
    try:
        results = Results(read_grid(options.grid), options.results)
        found = tables(results)
        for title, table in found:
            print(f"\n{title}\n")
            print("\n".join(aligned(table, left=(0, 1, 2))))
        print(f"\n{state(results)}")
        if options.write:
            figures = write_figures(results, options.write.parent)
            replace_between_marks(options.write, markdown(found, figures, state(results)), MARKS)
    except ValueError as error:
        sys.exit(f"study: {error}")


if __name__ == "__main__":
    main()
