# SPDX-License-Identifier: Apache-2.0
"""The section on benchmarks of a single run's page, and its rows in the summary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_smar.report.run import Run, format_summary, read_run, render, write_run_report
from tests.unit.report.files import benchmark, routing, task, write_events, write_results


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Returns a run with results on a benchmark and a task before and after it."""
    folder = write_events(tmp_path / "run", "lm loss")
    write_results(tmp_path / "run/results.json", benchmarks={"mme": benchmark(1300)}, tasks={"mmlu": task(0.6)})
    before = write_results(tmp_path / "before.json", benchmarks={"mme": benchmark(1200)})
    return read_run(folder, before=before)


def section_of(run: Run) -> str:
    """Returns the section on benchmarks of a run's page."""
    return next(part for part in render(run).split("<h2>") if part.startswith("Benchmarks<"))


def test_the_page_shows_scores_routing_and_skipped_samples_of_each_benchmark(run: Run) -> None:
    shown = section_of(run)
    for text in ("1,200.00", "1,300.00", "points/OCR", "0.600 ± 0.010", "its picture is missing (2)", "MME (release)"):
        assert text in shown, text
    titles = re.findall("<h3>(.*?)</h3>", shown)
    assert titles == ["MME (release)", "MRD distance by layer", "Text tokens", "Vision tokens", "The difference"]


def test_the_summary_has_the_scores_before_and_after_the_run(run: Run) -> None:
    rows = {line.split("  ")[0]: line.split()[-2:] for line in format_summary(run).splitlines()}
    assert rows["MME, perception"] == ["1,200.00", "1,300.00"]


def test_a_benchmark_without_routing_or_published_answers_is_still_shown(tmp_path: Path) -> None:
    write_results(tmp_path / "run/results.json", benchmarks={"vet": benchmark(title="MM-Vet", metrics={}, routing={})})
    shown = section_of(read_run(tmp_path / "run"))
    assert "MM-Vet" in shown and "the reference answers are not published" in shown and "<svg" not in shown


def test_the_page_shows_the_routing_of_the_held_out_questions(tmp_path: Path) -> None:
    shares = {kind: [[0.5, 0.5]] * 2 for kind in ("text", "vision")}
    write_results(tmp_path / "run/results.json", mrd_distance_by_layer=[0.5, None], expert_share=shares)
    page = render(read_run(tmp_path / "run"))
    for title in ("Along the model", "Text tokens", "Vision tokens", "The difference"):
        assert f"<h3>{title}</h3>" in page, title


def test_a_folder_with_results_only_has_a_report(tmp_path: Path) -> None:
    write_results(tmp_path / "run/results.json", tasks={"mmlu": task()})
    report, page = write_run_report(read_run(tmp_path / "run"), tmp_path / "out")
    assert "No logged steps" in page.read_text() and "mmlu" in report.read_text()


def test_results_of_a_model_of_another_size_are_refused_as_those_before_the_run(tmp_path: Path) -> None:
    write_results(tmp_path / "run/results.json", benchmarks={"mme": benchmark()})
    before = write_results(tmp_path / "before.json", benchmarks={"mme": benchmark(routing=routing(4, 2))})
    with pytest.raises(ValueError, match="MME: 4 and 3 MoE layers, 2 and 2 experts"):
        read_run(tmp_path / "run", before=before)
