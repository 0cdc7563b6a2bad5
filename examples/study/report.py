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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(Path(__file__).parents[1] / "emoji_tiny")]

from megatron_smar import runtime

runtime.install_or_exit("cpu")  # the grid's flags are checked with Megatron's parser

from documents import replace_between_marks
from findings import (
    BASELINE,
    HYPOTHESES,
    MEASURES,
    Results,
    chosen,
    planned,
    summary,
    tried,
    verdicts,
    wrongly_chosen,
)
from grid import MAIN, add_places, read_grid, set_places
from paired import Interval
from study_figures import write_figures

from megatron_smar.report.numbers import aligned

MARKS = ("<!-- written by examples/study/report.py --write -->", "<!-- end of the results -->")
Table = list[tuple[str, ...]]


class Shown(NamedTuple):
    """A table of arms.

    Attributes:
        title: Its title without the model.
        model: The model.
        arms: Its arms, in order.
        form: `measures`: all measures; `scores`: the SMAR paper's Table 2, with the model before; `smar`: its
            Tables 4 and 5, the measures with the settings of SMAR; `relative`: SMoES's, changes relative to `none`;
            `kinds`: picture questions by kind.
    """

    title: str
    model: str
    arms: tuple[str, ...]
    form: str = "measures"


METHODS = ("none", "balance", "smar", "sqrt", "sqrt_smar", "smoes", "smoes_gaussian")
ROUTINGS = ("hard", "hard_6_2", "layer_split", "moiie", "label_ce", "modality_gates", "modality_balance", "ernie")
ABLATION = ("none", "smoes_8_binning", "smoes_8_hard", "smoes_8_kl", "smoes_8_fixed", "smoes_8", "smoes_8_strong")
RATES = ("none_lr_0005", "none_lr_00075", "none", "smar_lr_0005", "smar")
BANDS = ("none", "smar_05", "smar_10", "smar_15", "smar", "smar_30", "smar_05_paper", "smar_paper", "smar_30_paper")
SHARES = tuple(f"{arm}{share}" for arm in ("none", "smar") for share in ("_text_0", "", "_text_6", "_text_20"))
SMALL = ("none", "balance", "hard", "moiie", "smar", "smar_30", "smar_30_paper", "smoes_8", "smoes_8_strong")
TABLES = (
    Shown("Language scores by method (in the form of the SMAR paper's Table 2)", "large", METHODS + ROUTINGS, "scores"),
    Shown("SMAR's band (Table 4)", "large", BANDS, "smar"),
    Shown("SMAR's band", "small", BANDS, "smar"),
    Shown(
        "SMAR's bias and load balancing (Table 5)", "large", ("smar_15_no_bias", "smar_15", "smar_15_balance"), "smar"
    ),
    Shown("Relative to none (SMoES's main table)", "large", METHODS + ROUTINGS, "relative"),
    Shown("Relative to none", "small", SMALL, "relative"),
    Shown("SMoES's ablation", "small", ABLATION, "relative"),
    Shown("All measures", "large", METHODS + ROUTINGS),
    Shown("All measures", "small", SMALL),
    Shown("Share of pure text", "large", SHARES),
    Shown("Learning rate", "large", RATES),
    Shown("Picture questions by kind", "large", METHODS + ROUTINGS, "kinds"),
    Shown("Picture questions by kind", "small", SMALL, "kinds"),
)


def table(results: Results, shown: Shown) -> Table:
    """Returns a table of arms; empty if none of its arms has results."""
    rows = FORMS[shown.form](results, shown, [arm for arm in shown.arms if arm in results.arms(MAIN, shown.model)])
    return rows if len(rows) > 1 else []


def parts(found: Interval, scale: float = 100, signed: bool = False) -> str:
    """Returns a mean with the half-width of its interval, in percent or points; with a scale of 1, as it is."""
    if math.isnan(found.mean):
        return "-"
    form = f"{'+' if signed else ''}.{1 if scale > 1 else 3}f"
    half = "" if math.isnan(found.low) else f" ± {scale * (found.high - found.mean):{form.lstrip('+')}}"
    return f"{scale * found.mean:{form}}{half}"


def measures_table(results: Results, shown: Shown, arms: Sequence[str]) -> Table:
    """Returns a table of all measures."""
    header = ("arm", "seeds", "retention %", "minus none", "at equal pictures", "perplexity ratio", "minus none")
    rows: Table = [(*header, "picture questions %", "minus none", "MSI", "distance", "load entropy", "crossing %")]
    for arm in arms:
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
    return rows


def scores_table(results: Results, shown: Shown, arms: Sequence[str]) -> Table:
    """Returns the language scores of the model that all arms start from and of each arm, and their ratio."""
    names = ("word_accuracy", "text_perplexity", "vqa_accuracy")
    rows: Table = [("model", "seeds", "words completed %", "perplexity", "picture questions %", "retention %")]
    for arm in arms:
        own = list(results.of_arm(MAIN, shown.model, arm).values())
        for time in ("before", "after") if arm == BASELINE else ("after",):
            words, perplexity, pictures = (summary([result[time][name] for result in own]) for name in names)
            numbers = (parts(words), f"{perplexity.mean:.1f}", parts(pictures))
            ratio = summary(list(results.values(MAIN, shown.model, arm, "retention").values()))
            name, kept = (arm, parts(ratio)) if time == "after" else ("before", "100")
            rows.append((name, str(len(own)), *numbers, kept))
    return rows


def smar_table(results: Results, shown: Shown, arms: Sequence[str]) -> Table:
    """Returns the measures of SMAR's arms with its settings."""
    names = ("retention", "pictures", "entropy")
    header = ("arm", "seeds", "coefficient", "d_min", "d_max", "bias", "balance", "retention %", "minus none")
    rows: Table = [(*header, "picture questions %", "minus none", "distance", "minus none", "load entropy")]
    for arm in arms:
        flags = results.grid.flags_of(shown.model, arm)
        has_bias = flags["modality-routing"] == "smar" and not flags.get("no-modality-router-bias")
        settings = [str(flags.get(name, "")) for name in ("smar-coeff", "smar-d-min", "smar-d-max")]
        settings += ["yes" if has else "no" for has in (has_bias, "moe-aux-loss-coeff" in flags)]
        own = [summary(list(results.values(MAIN, shown.model, arm, name).values())) for name in names]
        language, pictures = (
            (parts(found), _minus_none(results, shown.model, arm, name, 100))
            for name, found in zip(names[:2], own[:2], strict=True)
        )
        moved = (_distances(results, shown.model, arm), _minus_none(results, shown.model, arm, "distance", 1))
        numbers = (*language, *pictures, *moved, parts(own[2], 1))
        rows.append((arm, str(len(results.of_arm(MAIN, shown.model, arm))), *settings, *numbers))
    return rows


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
    found = results.differences(MAIN, model, arm, other, measure) if other else []
    return _of_pairs(found, scale, len(results.of_arm(MAIN, model, arm))) if other else ""


def _at_equal_pictures(results: Results, model: str, arm: str) -> str:
    if arm.startswith(BASELINE) or "_text_" in arm:
        return ""
    return _of_pairs(results.at_equal_pictures(model, arm), 100, len(results.of_arm(MAIN, model, arm)))


def _of_pairs(found: Sequence[float], scale: float, seeds: int) -> str:
    """Returns the mean of paired differences, with their number where seeds have no pair."""
    return parts(summary(found), scale, signed=True) + (f" ({len(found)} pairs)" if 0 < len(found) < seeds else "")


def _distances(results: Results, model: str, arm: str) -> str:
    """Returns the mean distance, and that of the layers with the least and the greatest, means over seeds."""
    by_seed = [result["after"]["mrd_distance"] for result in results.of_arm(MAIN, model, arm).values()]
    layers = [statistics.fmean(layer) for layer in zip(*by_seed, strict=True)]
    return f"{statistics.fmean(layers):.2f} ({min(layers):.2f} to {max(layers):.2f})"


def relative_table(results: Results, shown: Shown, arms: Sequence[str]) -> Table:
    """Returns SMoES's columns: MSI, and changes relative to `none`."""
    rows: Table = [("arm", "pairs", "MSI", "pictures", "language", "mean of both")]
    for arm in arms:
        msi = statistics.fmean(results.values(MAIN, shown.model, arm, "msi").values())
        change = {name: relative(results, shown.model, arm, name) for name in ("pictures", "retention")}
        overall = [(a + b) / 2 for a, b in zip(*change.values(), strict=True)]
        columns = [parts(summary(found), signed=True) + " %" for found in (*change.values(), overall)]
        rows.append((arm, str(len(overall)), f"{msi:.3f}", *columns))
    return rows


def relative(results: Results, model: str, arm: str, measure: str) -> list[float]:
    """Returns a measure of each seed relative to that of `none` with the same seed, minus 1."""
    return [value / none - 1 for value, none in results.pairs(MAIN, model, arm, BASELINE, measure)]


def kinds_table(results: Results, shown: Shown, arms: Sequence[str]) -> Table:
    """Returns the accuracy by kind of picture question."""
    kinds: list[str] = []
    rows: Table = []
    for arm in arms:
        by_seed = [result["after"]["vqa_by_kind"] for result in results.of_arm(MAIN, shown.model, arm).values()]
        kinds = kinds or list(by_seed[0])
        means = {kind: summary([found[kind] for found in by_seed]) for kind in kinds}
        rows.append((arm, str(len(by_seed)), *(parts(means[kind]) for kind in kinds)))
    return [("arm", "seeds", *(f"{kind} %" for kind in kinds)), *rows]


FORMS = {
    "measures": measures_table,
    "scores": scores_table,
    "smar": smar_table,
    "relative": relative_table,
    "kinds": kinds_table,
}


def hypotheses_table(results: Results) -> Table:
    """Returns the verdicts, without numbers where runs are missing; empty if there is none."""
    found = verdicts(results)
    header = ("", "hypothesis", "pairs", "difference", "± over passages", "picture questions")
    rows: Table = [(*header, "p (of H3 and H7: with the margin)", "Holm's p", "outcome")]
    for name, claim in planned(results).items():
        if name not in found:
            rows.append((name, claim.claim, *6 * ("",), "incomplete"))
            continue
        verdict = found[name]
        scale = 1 if HYPOTHESES[name].measure == "entropy" else 100
        shown = parts(verdict.difference, scale, signed=True)
        pictures = parts(verdict.pictures, signed=True)
        sampling = "-" if math.isnan(verdict.sampling) else f"{100 * verdict.sampling:.1f}"
        numbers = (str(verdict.seeds), shown, sampling, pictures, f"{verdict.p:.3f}", f"{verdict.adjusted:.3f}")
        rows.append((name, HYPOTHESES[name].claim, *numbers, verdict.outcome))
    return rows if found else []


def tuning_table(results: Results) -> Table:
    """Returns what the tuning tried, with the chosen value of each flag marked; empty without results."""
    header = ("model", "arm", "setting", "seeds", "retention %", "perplexity ratio", "picture questions %", "distance")
    rows: Table = [(*header, "MSI", "crossing %", "choice")]
    best = chosen(results)
    for each in tried(results):
        numbers = (f"{100 * each.retention:.1f}", f"{each.perplexity:.2f}", f"{100 * each.pictures:.1f}")
        routing = (f"{each.distance:.2f}", f"{each.msi:.2f}", f"{100 * each.crossing:.1f}")
        choice = "chosen" if each in best else ""
        setting = each.setting.replace("_", " ")
        rows.append((each.model, each.arm, setting, str(each.seeds), *numbers, *routing, choice))
    return rows if len(rows) > 1 else []


def tables(results: Results) -> list[tuple[str, Table]]:
    """Returns all tables that have results, with their titles."""
    found = [("Hypotheses", hypotheses_table(results))]
    found += [(f"{shown.title}: {shown.model}", table(results, shown)) for shown in TABLES]
    found.append(("Tuning, means over seeds of its own on the validation half", tuning_table(results)))
    return [(title, rows) for title, rows in found if rows]


def state(results: Results) -> str:
    """Returns how many runs are done, missing and failed, and what a reader must know about them, in sentences."""
    lines = [f"Runs: {len(results.found)} done, {len(results.missing)} missing, {len(results.failed)} failed."]
    if len(results.codes) > 1:
        lines.append(f"They were made by {len(results.codes)} versions of the code.")
    if results.unpaired:
        lines.append(f"Not all arms of {', '.join(results.unpaired)} started from the same checkpoint.")
    if results.without_effect:
        lines.append(f"These runs have other settings and the same results: {', '.join(results.without_effect)}.")
    if results.other_language:
        lines.append(f"The seeds of {', '.join(results.other_language)} differ in the language model or the texts.")
    if wrong := wrongly_chosen(results) if results.grid.main["runs"] else []:
        lines.append(f"The tuning's rule chooses {', '.join(wrong)}, and the grid's main.chosen has another value.")
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
        for title, rows in found:
            print(f"\n{title}\n")
            print("\n".join(aligned(rows, left=(0, 1, 2))))
        print(f"\n{state(results)}")
        if options.write:
            figures = write_figures(results, options.write.parent)
            replace_between_marks(options.write, markdown(found, figures, state(results)), MARKS)
    except ValueError as error:
        sys.exit(f"study: {error}")


if __name__ == "__main__":
    main()
