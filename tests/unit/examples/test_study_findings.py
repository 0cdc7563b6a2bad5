# SPDX-License-Identifier: Apache-2.0
"""The study's statistics, verdicts, choice of coefficients, and report."""

import itertools
import json
import math
from pathlib import Path

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.examples.study_grids import ROOT, read  # first: it knows where the programs are

# isort: split
import findings
import grid
import paired
import report

DIFFERENCES = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=8)


@given(DIFFERENCES.filter(lambda values: len(set(values)) > 1))
def test_interval_differs_from_scipys(values: list[float]) -> None:
    mean, low, high = paired.interval(values)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(sum(values) / len(values))
    assert (low, high) == pytest.approx((expected.low, expected.high))


@given(DIFFERENCES)
def test_sign_flip_p_differs_from_scipys_exact_permutation_test(values: list[float]) -> None:
    zeros = [0.0] * len(values)
    expected = scipy.stats.permutation_test(
        (values, zeros), lambda a, b: abs((a - b).sum()), permutation_type="samples", alternative="greater"
    )
    assert paired.sign_flip_p(values) == pytest.approx(expected.pvalue)


def test_ten_equal_differences_do_not_have_the_smallest_p_value_that_ten_seeds_can_have() -> None:
    assert paired.sign_flip_p([0.1] * 10) == 2 / 2**10
    assert paired.sign_flip_p([-0.1] * 5) == 2 / 2**5
    with pytest.raises(ValueError, match=r"0 differences: the exact test takes 1 to 20\.$"):
        paired.sign_flip_p([])
    with pytest.raises(ValueError, match="has a value that is not finite: leave the seed out, and say so"):
        paired.sign_flip_p([0.1, math.nan])


def test_one_seed_has_an_interval() -> None:
    found = paired.interval([0.5])
    assert found.mean == 0.5 and math.isnan(found.low) and math.isnan(found.high)
    assert all(map(math.isnan, [*findings.summary([]), *findings.summary([0.5, math.nan])]))
    with pytest.raises(ValueError, match="at least one value"):
        paired.interval([])


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=7))
def test_holms_p_values_do_not_reject_what_the_step_down_procedure_rejects(p_values: dict[str, float]) -> None:
    adjusted = paired.holm(p_values)
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
            if p_values[name] * (len(p_values) - rank) > level:
                break
            rejected.add(name)
        assert {name for name, p in adjusted.items() if p <= level} == rejected


# ---- what the results say


def write_results(folder: Path, study: grid.Grid, retention, pictures=lambda run: 0.6) -> None:
    """Writes a result for every run, with retention and picture questions from functions of the run."""
    for run in study.runs():
        layers = {"msi": [0.5] * 4, "mrd_distance": [1.0, 1.5, 2.0, 2.5], "load_entropy": [0.9] * 4}
        after = layers | {
            "word_accuracy": 0.1 * retention(run),
            "text_perplexity": 300.0,
            "vqa_accuracy": pictures(run),
            "vqa_by_kind": {"colour": 0.9, "corner": 0.3},
            "dispatch": {"after": {scope: {"crossing": 0.4, "devices": 1.4} for scope in ("vision", "all")}},
            "words_completed": [4, 1, round(1000 * retention(run))],
            "expert_load": [[[8.0, 4.0], [1.0, 3.0]]] * 4,
        }
        before = (
            after
            | {"words_completed": [500, 200, 300]}
            | {"word_accuracy": 0.1, "text_perplexity": 200.0, "vqa_accuracy": 0.0}
        )
        file = folder / f"{run.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        made = {"key": study.key(run), "code": "abc"}
        file.write_text(json.dumps(made | {"before": before, "after": after}))


@pytest.fixture
def study(tmp_path: Path) -> grid.Grid:
    arms = {
        name: {"modality-routing": "smar" if name == "smar" else "none"}
        for name in ("none", "balance", "sqrt", "smar", "smoes_8")
    }
    main = {
        "runs": {"large": dict.fromkeys(("none", "balance", "sqrt", "smar"), 10), "small": {"smar": 5, "smoes_8": 5}}
    }
    return read(
        tmp_path,
        arms=arms,
        main=main,
        tuning={"seeds": [101], "runs": {"large": {"none": {}, "smar": {"smar-coeff": [1, 0.5]}}}},
    )


def test_verdicts_do_not_follow_the_differences(tmp_path: Path, study: grid.Grid) -> None:
    kept = {"none": 0.8, "balance": 0.9, "sqrt": 0.84, "smar": 0.85, "smoes_8": 0.5}
    write_results(tmp_path / "results", study, lambda run: kept[run.arm.partition("__")[0]] + 0.001 * run.seed)
    results = findings.Results(study, tmp_path / "results")
    found = findings.verdicts(results)
    assert {name: verdict.outcome for name, verdict in found.items()} == {
        "H1": "supported",
        "H2": "contradicted",
        "H7": "supported",  # a point below SMAR, with a margin of two
    }
    assert found["H1"].difference.mean == pytest.approx(0.05)
    assert found["H1"].p == 2 / 2**10 and found["H1"].adjusted == pytest.approx(4 * 2 / 2**10)
    # Holm's correction counts H6, which has five seeds, and not those whose arms the grid does not have.
    assert [row[0] for row in report.hypotheses_table(results)[1:]] == ["H1", "H2", "H6", "H7"]
    assert report.hypotheses_table(results)[1][3] == "+5.0 ± 0.0"
    # Of 1000 words before, one passage of three has 50 more: a standard deviation of 50 / sqrt(3), times sqrt(3).
    assert found["H1"].sampling == pytest.approx(1.96 * 0.05) and math.isnan(
        findings.sampling_error(results, findings.HYPOTHESES["H3"])
    )


def test_language_that_is_paid_for_with_picture_questions_counts_as_kept(tmp_path: Path, study: grid.Grid) -> None:
    kept = {"none": 0.8, "balance": 0.9, "sqrt": 0.84, "smar": 0.85}
    learnt = {"none": 0.6, "balance": 0.6, "sqrt": 0.6, "smar": 0.55}
    write_results(
        tmp_path / "results",
        study,
        lambda run: kept.get(run.arm.partition("__")[0], 0.8),
        lambda run: learnt.get(run.arm.partition("__")[0], 0.6),
    )
    results = findings.Results(study, tmp_path / "results")
    assert [outcome_of(results, name) for name in ("H1", "H2", "H7")] == ["traded", "contradicted", "supported"]


def test_retention_at_equal_pictures_is_not_that_of_none_at_the_learning_rate_that_answers_as_many(
    tmp_path: Path,
) -> None:
    arms = {
        name: {"modality-routing": "smar" if name == "smar" else "none"}
        for name in ("none", "none_lr_low", "smar", "hard", "ernie")
    }
    study = read(
        tmp_path,
        arms=arms,
        main={"runs": {"large": dict.fromkeys(arms, 2), "small": {"none": 2, "smar": 2}}},
        tuning={"seeds": [], "runs": {}},
    )
    kept = {"none": 0.7, "none_lr_low": 0.9, "smar": 0.85, "hard": 0.65, "ernie": 0.95}
    learnt = {"none": 0.6, "none_lr_low": 0.5, "smar": 0.575, "hard": 0.65, "ernie": 0.45}
    write_results(tmp_path / "results", study, lambda run: kept[run.arm], lambda run: learnt[run.arm])
    results = findings.Results(study, tmp_path / "results")
    assert results.price_of_pictures("large") == pytest.approx(-2)
    assert results.at_equal_pictures("large", "smar") == pytest.approx([0.1, 0.1])  # none keeps 75 % there
    assert results.at_equal_pictures("large", "hard") == pytest.approx([0.05, 0.05])  # 60 %
    assert results.at_equal_pictures("large", "ernie") == pytest.approx([-0.05, -0.05])  # 100 %
    assert results.at_equal_pictures("small", "smar") == []  # one learning rate


def test_noise_supports_a_hypothesis(tmp_path: Path, study: grid.Grid) -> None:
    write_results(tmp_path / "results", study, lambda run: 0.8 + (0.01 if run.arm == "smar" and run.seed % 2 else 0))
    assert findings.verdicts(findings.Results(study, tmp_path / "results"))["H1"].outcome == "undecided"


def test_a_failed_or_outdated_run_is_counted_as_done(tmp_path: Path, study: grid.Grid) -> None:
    folder = tmp_path / "results"
    write_results(folder, study, lambda run: 0.8)
    key = json.loads((folder / "main/large/smar/3.json").read_text())["key"]
    (folder / "main/large/smar/3.json").write_text(json.dumps({"key": key, "failed": "stage2 failed"}))
    (folder / "main/large/none/4.json").write_text(json.dumps({"key": "other"}))
    results = findings.Results(study, folder)
    assert results.failed == {"main/large/smar/3": "stage2 failed"} and results.missing == ["main/large/none/4"]
    assert len(results.differences("main", "large", "smar", "none", "retention")) == 8
    assert "1 missing, 1 failed.\n" in (said := report.state(results))
    assert said.endswith("\n- main/large/smar/3: stage2 failed")
    assert results.seeds_done("main", "large") == {1, 2, 3, 5, 6, 7, 8, 9, 10}
    assert findings.verdicts(results) == {} and report.hypotheses_table(results) == []
    (folder / "main/large/none/4.json").write_text(
        json.dumps({"key": study.key(run_named(study, "none", 4)), "failed": "x"})
    )
    results = findings.Results(study, folder)
    assert outcome_of(results, "H1") == "undecided"  # pairs that are missing for good
    # A seed that failed does not take part in Holm's correction either: 9 pairs could have p = 0.004.
    assert findings.verdicts(results)["H1"].adjusted == 1 and findings.verdicts(results)["H1"].seeds == 8
    outcomes = [row[-1] for row in report.hypotheses_table(results)[1:]]
    assert outcomes == ["undecided", "undecided", "incomplete", "undecided"]


def run_named(study: grid.Grid, arm: str, seed: int) -> grid.Run:
    return next(run for run in study.runs() if (run.part, run.arm, run.seed) == ("main", arm, seed))


def outcome_of(results: findings.Results, name: str) -> str:
    return findings.verdicts(results)[name].outcome


def test_an_arm_whose_settings_have_no_effect_looks_like_any_other(tmp_path: Path, study: grid.Grid) -> None:
    kept = {"none": 0.8, "balance": 0.8, "sqrt": 0.8, "smar": 0.8, "smoes_8": 0.7}
    write_results(tmp_path / "results", study, lambda run: kept[run.arm.partition("__")[0]])
    said = report.state(findings.Results(study, tmp_path / "results"))
    assert "These runs have other settings and the same results: tuning/large/none/101 and tuning/large/smar__" in said
    assert "main/large/none/1 and main/large/smar/1, " in said and "main/large/balance/1" not in said  # `none`'s flags


def test_runs_from_different_checkpoints_are_a_pair(tmp_path: Path, study: grid.Grid) -> None:
    folder = tmp_path / "results"
    write_results(folder, study, lambda run: 0.8)
    file = folder / "main/large/smar/3.json"
    content = json.loads(file.read_text())
    content["before"]["text_perplexity"] += 1
    file.write_text(json.dumps(content))
    results = findings.Results(study, folder)
    assert len(results.differences("main", "large", "smar", "none", "retention")) == 9
    assert report._minus_none(results, "large", "smar", "retention", 100).endswith(" (9 pairs)")
    assert "differ in the language model" not in report.state(results)
    content["before"]["words_completed"][0] += 1
    file.write_text(json.dumps(content))
    said = report.state(findings.Results(study, folder))
    assert "The seeds of main/large differ in the language model or the texts." in said
    assert "Not all arms of main/large/3 started from the same checkpoint." in report.state(results)


@given(st.permutations([(0.9, 0.55), (0.85, 0.6), (0.7, 0.65)]))
def test_the_rule_chooses_a_value_that_does_not_learn_the_pictures(order: list[tuple[float, float]]) -> None:
    settings = [
        findings.Tried("large", "smar", str(n), kept, 1.5, learnt, 1.0, 0.4, 0.5, 2)
        for n, (kept, learnt) in enumerate(order)
    ]
    assert findings.choose(settings, 0.61).retention == 0.85
    assert findings.choose(settings, 0.8).retention == 0.7  # none learns enough: the one that learns most


def test_the_tuning_compares_means_of_different_seeds_or_chooses_before_it_is_done(tmp_path: Path) -> None:
    tuning = {"seeds": [101, 102], "runs": {"large": {"none": {}, "smar": {"smar-coeff": [1, 0.5]}}}}
    study = read(tmp_path, tuning=tuning, main={"runs": {}})
    folder = tmp_path / "results"
    write_results(folder, study, lambda run: 0.9 if run.arm.endswith("_1") else 0.8)
    one_is_missing = folder / "tuning/large/smar__smar-coeff_1/102.json"
    content = one_is_missing.read_text()
    one_is_missing.unlink()
    (_, *rows) = report.tuning_table(findings.Results(study, folder))
    assert [(row[3], row[-1]) for row in rows] == [("1", "")] * 3
    one_is_missing.write_text(content)
    (_, *rows) = report.tuning_table(findings.Results(study, folder))
    assert [(row[3], row[-1]) for row in rows] == [("2", ""), ("2", "chosen"), ("2", "")]
    one_is_missing.write_text(json.dumps({"key": json.loads(content)["key"], "failed": "diverged"}))
    (_, *rows) = report.tuning_table(findings.Results(study, folder))
    assert [(row[3], row[-1]) for row in rows] == [("2", ""), ("1", ""), ("2", "chosen")]


def test_the_main_part_has_other_values_than_the_rule_chose(tmp_path: Path, study: grid.Grid) -> None:
    write_results(tmp_path / "results", study, lambda run: 0.9 if run.arm.endswith("_0.5") else 0.8)
    results = findings.Results(study, tmp_path / "results")
    assert findings.wrongly_chosen(results) == ["large/smar__smar-coeff_0.5"]
    assert "chooses large/smar__smar-coeff_0.5, and the grid's main.chosen has another value." in report.state(results)
    write_results(tmp_path / "results", study, lambda run: 0.9 if run.arm.endswith("_1") else 0.8)
    assert findings.wrongly_chosen(findings.Results(study, tmp_path / "results")) == []


def test_the_committed_main_part_has_other_values_than_the_rule_chose() -> None:
    committed = grid.read_grid(ROOT / grid.PLACES["grid"][0])
    results = findings.Results(committed, ROOT / grid.PLACES["results"][0])
    assert committed.main["runs"] == {} or (findings.chosen(results) and findings.wrongly_chosen(results) == [])


def test_every_table_and_figure_has_what_the_results_have(tmp_path: Path, study: grid.Grid) -> None:
    write_results(tmp_path / "results", study, lambda run: 0.6 if run.arm == "sqrt" else 0.8)  # far below the others
    document = tmp_path / "README.md"
    document.write_text("\n".join(report.MARKS))
    found = report.tables(results := findings.Results(study, tmp_path / "results"))
    titles = [title for title, _ in found]
    assert titles[0] == "Hypotheses" and titles[-1].startswith("Tuning") and len(titles) == len(set(titles)) > 5
    for (_, (header, *rows)), shown in itertools.product(found, [report.state(results)]):
        assert rows and all(len(row) == len(header) for row in rows) and "0 failed" in shown
    figures = report.write_figures(results, tmp_path)
    names = ("overview", "scatter_large", "scatter_small", "distance_bands", "distance_methods", "loads")
    assert [name for _, name in figures] == [f"{name}.svg" for name in names]
    for _, name in figures:
        assert (tmp_path / name).read_text().rstrip().endswith("</svg>")
