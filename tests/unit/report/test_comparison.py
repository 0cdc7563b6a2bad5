# SPDX-License-Identifier: Apache-2.0
"""`tools/report.py --compare`: its page, its figures, its table, and the input that it refuses."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_smar.commands.report import main
from megatron_smar.report import comparison_sections, style
from megatron_smar.report.comparison import format_comparison, read_runs, write_comparison
from megatron_smar.report.comparison_figures import Panel, distance_panels
from megatron_smar.report.figures import expert_maps_by_run
from megatron_smar.report.run import Run
from tests.unit.report.files import benchmark, routing, task, write_events, write_results

HELD_OUT = {"mrd_distance_by_layer": [0.5, 1.5], "expert_share": {"text": [[0.2, 0.8]] * 2, "vision": [[0.5, 0.5]] * 2}}
TITLES = ["Scores", "MRD distance by layer", "Which experts serve which modality", "Training"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a run that has everything, one without logs and one with logs only."""
    folder = tmp_path_factory.mktemp("runs")
    write_events(folder / "first", "lm loss", "mrd distance")
    results = {"benchmarks": {"mme": benchmark(1300)}, "tasks": {"mmlu": task(0.6)}}
    write_results(folder / "first/results.json", **HELD_OUT, **results)
    write_results(folder / "second.json", benchmarks={"mme": benchmark(1200)}, tasks={"mmlu": task(0.7)})
    write_events(folder / "logged", "lm loss")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Run]:
    """Returns the runs in the folder."""
    return read_runs([f"{folder}/first", f"{folder}/second.json", f"third={folder}/logged"])


@pytest.fixture(scope="module")
def written(runs: list[Run], folder: Path) -> Path:
    """Returns the folder of the comparison of the runs."""
    write_comparison(runs, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    """Returns the page of the comparison."""
    return (written / "comparison.html").read_text()


def page_of(runs: list[Run], folder: Path) -> str:
    """Writes a comparison and returns its page."""
    return write_comparison(runs, folder)[0].read_text()


def sections_of(page: str) -> dict[str, str]:
    """Returns the sections of a page by title."""
    parts = page.split("<h2>")[1:]
    return {part.partition("</h2>")[0]: part for part in parts}


def test_runs_have_the_name_of_their_folder_or_file_unless_one_is_given(runs: list[Run], tmp_path: Path) -> None:
    results = write_results(tmp_path / "other/results.json", tasks={})
    assert [run.name for run in [*runs, *read_runs([str(results)])]] == ["first", "second", "third", "other"]


def test_every_section_names_the_runs_that_lack_its_data(page: str) -> None:
    found = sections_of(page)
    assert list(found)[:4] == TITLES
    assert "Without scores on benchmarks or tasks: third." in found["Scores"]
    assert "Without distances by layer: third." in found["MRD distance by layer"]
    assert "Without data here: second, third." in found["MRD distance by layer"]  # of the held-out questions
    assert "Without shares of experts: third." in found["Which experts serve which modality"]
    assert "Without logged scalars: second." in found["Training"]


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    logged = read_runs([str(write_events(tmp_path / name, "lm loss")) for name in ("a", "b")])
    assert list(sections_of(page_of(logged, tmp_path / "out"))) == ["Training", "How the numbers were measured"]
    assert format_comparison(logged, 80, bold=False) == ""


def test_the_best_score_is_bold_on_the_page_and_marked_on_the_terminal(runs: list[Run], page: str) -> None:
    bold = re.findall("<strong>(.*?)</strong>", page)
    assert bold == ["1,300.00", "0.700 ± 0.010"]
    plain = format_comparison(runs, 80, bold=False)
    assert "1,300.00*" in plain and "0.700 ± 0.010*" in plain and plain.endswith("* the best of its column")
    assert "\033[1m0.700 ± 0.010\033[0m" in format_comparison(runs, 80, bold=True)


@pytest.mark.parametrize("width", [10, 30, 200])
def test_tables_are_no_wider_than_the_terminal_where_one_column_fits(width: int, runs: list[Run]) -> None:
    table = format_comparison(runs, width, bold=False).split("\n\n")
    headers = [part.splitlines()[0] for part in table if "-shot" in part or "perception" in part]
    assert len(headers) == (1 if width == 200 else 2)
    assert width == 10 or max(map(len, headers)) <= width


def test_figures_are_written_as_png_and_svg(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    stems = ["mrd_distance", "experts_held_out_questions", "experts_mme", "training"]
    figures = {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert names == {"comparison.html", "comparison.json"} | figures
    assert all((written / name).stat().st_size > 1000 for name in figures)


def test_the_json_file_holds_the_results_and_the_curves(written: Path) -> None:
    content = json.loads((written / "comparison.json").read_text())["runs"]
    assert content["first"]["results"]["benchmarks"]["mme"]["metrics"]["perception"] == 1300
    assert content["third"] == {
        "band": None,
        "results": None,
        "training": {"lm loss": {"steps": [1, 2], "values": [3.0, 1.5]}},
    }


def test_ids_of_the_figures_are_unique_and_colors_follow_the_page(page: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not [light for light, _ in style.PALETTE.values() if light in drawings]


def test_names_of_runs_are_shown_and_not_run_as_html(tmp_path: Path) -> None:
    path = write_results(tmp_path / "r.json", tasks={"mmlu": task()})
    page = page_of(read_runs([f"<script>={path}", f"b={path}"]), tmp_path / "out")
    assert "<script" not in page and "&lt;script&gt;" in page


def panel(*runs: str) -> Panel:
    """Returns a panel with the same curve for each run."""
    return Panel("MME", "distance", {run: ([1, 2], [0.5, 1.0]) for run in runs})


def legend_of(bands: dict[str, tuple[float, float]]) -> list[str]:
    """Returns the legend of a panel of the runs a, b and c."""
    figure = distance_panels(["a", "b", "c"], [panel("a", "b", "c")], bands)
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_each_band_is_shaded_once_and_names_the_runs_that_have_it() -> None:
    assert legend_of({}) == ["a", "b", "c"]
    assert legend_of(dict.fromkeys("abc", (0.5, 1.0)))[3:] == ["band 0.5 to 1"]
    bands = {"a": (0.5, 1.0), "b": (1.5, 2.0), "c": (0.5, 1.0)}
    assert legend_of(bands)[3:] == ["band 0.5 to 1 (a, c)", "band 1.5 to 2 (b)"]


def test_the_band_comes_from_the_flags_of_the_run(runs: list[Run]) -> None:
    smar = Namespace(modality_routing="smar", smar_d_min=0.5, smar_d_max=1.25, smar_coeff=0.01)
    named = [replace(runs[0], arguments=smar), *runs[1:]]
    assert "band 0.5 to 1.25 (first)" in comparison_sections.distances(named)
    assert "band" not in comparison_sections.distances(runs)


def test_a_run_keeps_its_color_in_panels_that_another_run_is_not_in() -> None:
    figure = distance_panels(["a", "b"], [panel("a", "b"), panel("b")], {})
    both, alone = figure.axes[:2]
    assert both.get_lines()[1].get_color() == alone.get_lines()[0].get_color() != both.get_lines()[0].get_color()


def test_a_legend_of_many_runs_does_not_shrink_the_panel() -> None:
    heights = []
    for count in (2, 30):
        runs = [f"a run with a long name, number {number}" for number in range(count)]
        figure = distance_panels(runs, [panel(*runs)], {})
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] > 0.9 * heights[0]


def test_a_name_that_begins_with_an_underscore_is_in_the_legend() -> None:
    figure = distance_panels(["_a"], [panel("_a")], {})
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_a"]


def test_heat_maps_have_one_row_per_run_and_no_map_for_a_modality_that_a_run_lacks() -> None:
    shares = {"a": {"text": [[0.5, 0.5]], "vision": [[0.1, 0.9]]}, "b": {"text": [[0.2, 0.3, 0.5]] * 4}}
    figure = expert_maps_by_run(shares, 1.0)
    sizes = [axes.images[0].get_size() for axes in figure.axes if axes.images]
    assert sizes == [(1, 2), (1, 2), (4, 3)]
    assert [axes.get_title(loc="left") for axes in figure.axes[:4]] == ["a", "", "b", ""]


def test_runs_of_different_sizes_are_plotted_and_the_sizes_are_said(tmp_path: Path) -> None:
    sizes = {"small": (2, 4), "large": (5, 8)}
    for name, (layers, experts) in sizes.items():
        write_results(tmp_path / f"{name}.json", benchmarks={"mme": benchmark(routing=routing(layers, experts))})
    runs = read_runs([str(tmp_path / f"{name}.json") for name in sizes])
    found = sections_of(page_of(runs, tmp_path / "out"))
    layers, experts = (
        "different numbers of MoE layers (small 2, large 5)",
        "different numbers of experts (small 4, large 8)",
    )
    assert layers in found["MRD distance by layer"] and experts in found["Which experts serve which modality"]
    assert layers in format_comparison(runs, 80, bold=False)


def test_different_numbers_of_questions_are_said(tmp_path: Path) -> None:
    files = [
        write_results(tmp_path / f"{asked}.json", benchmarks={"mme": benchmark(asked=asked)}) for asked in (10, 2374)
    ]
    said = format_comparison(read_runs(list(map(str, files))), 80, bold=False)
    assert "MME, perception: the runs answered different numbers of questions" in said and "(10 10, 2374 2,374)" in said


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> str:
    """Returns the sentence with which the program refuses its command line."""
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_unusable_input_gets_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, other = (
        write_results(tmp_path / "good.json", tasks={"mmlu": task()}),
        write_results(tmp_path / "other.json", history={}),
    )
    nothing = write_results(tmp_path / "nothing.json", text_perplexity=3.0)
    (tmp_path / "empty").mkdir()
    for words, sentence in (
        ([tmp_path / "absent"], "absent does not exist: give a run's folder or a results file"),
        ([tmp_path / "empty"], "and no results.json: give the folder of a run"),
        ([good, other], "has no results of evaluate.py"),
        ([good, good], "Several runs are named good: give them other names, as NAME=PATH."),
        ([f"={good}"], "is not NAME=PATH"),
        ([nothing], "There is nothing to compare: no logged loss, scores or routing in nothing."),
        ([good, "--before", good], "--before is for the report of one run"),
        ([good, "--output", good], "good.json is not a folder: give --output another path."),
    ):
        assert sentence in refusal(capsys, monkeypatch, "--compare", *words), words
    assert "RUN is missing" in refusal(capsys, monkeypatch)


def test_the_program_writes_into_the_folder_of_its_output(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--compare", folder / "logged", f"b={folder / 'second.json'}", "--output", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    said = capsys.readouterr().out
    assert done.value.code == 0 and f"comparison: {tmp_path / 'out' / 'comparison.html'}" in said
    assert (tmp_path / "out/comparison.html").is_file()
