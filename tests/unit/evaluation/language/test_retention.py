# SPDX-License-Identifier: Apache-2.0
"""Retention of language scores: the numbers of the paper's Table 2, standard errors, and what cannot be compared."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smar.evaluation.language.results import LanguageResults, ResultsError, TaskResult, parse_results
from megatron_smar.evaluation.language.retention import Estimate, mean, ratio, retention
from megatron_smar.evaluation.language.retention_table import format_retention, markdown

REPOSITORY = Path(__file__).resolve().parents[4]
TITLES = ("MMLU", "C-Eval", "GSM8K", "BBH", "ARC-Challenge", "MBPP")
TASKS = ("mmlu", "ceval-valid", "gsm8k_cot", "bbh", "arc_challenge", "mbpp")
# The paper's Table 2, in percent.
VICUNA = (53.9, 35.0, 38.1, 50.1, 52.5, 3.6)
LLAVA = (51.7, 19.1, 34.2, 48.0, 38.3, 0.0)
MIXTRAL = (72.0, 55.0, 67.2, 68.8, 82.0, 49.0)
BASELINE = (67.6, 47.4, 57.1, 62.0, 77.0, 10.4)
BALANCE = (67.8, 45.9, 56.6, 60.2, 81.0, 14.8)
SMAR = (68.0, 46.8, 57.0, 61.8, 79.3, 28.4)


def task(score: float, title: str = "MMLU", **values: Any) -> TaskResult:
    fields = {"metric": "acc,none", "stderr": 0.01, "samples": 1000, "version": "1.0", "shots": 5}
    return TaskResult(title=title, score=score, **{"chat_template": False, **fields, **values})


def results(percent: tuple[float, ...], **more: TaskResult) -> LanguageResults:
    tasks = {name: task(p / 100, title) for name, title, p in zip(TASKS, TITLES, percent, strict=True)}
    return LanguageResults("lm_eval 0.4.13", tasks | more)


def percent(number: Estimate) -> str:
    return f"{100 * number.value:.1f}"


def test_the_ratios_of_the_papers_table_2_are_reproduced() -> None:
    (llava,) = retention(results(VICUNA), {"LLaVA-1.5": results(LLAVA)}).models
    assert [percent(value) for value in llava.ratios.values()] == ["95.9", "54.6", "89.8", "95.8", "73.0", "0.0"]
    assert percent(llava.retention) == "82.0"
    models = {"baseline": results(BASELINE), "balance": results(BALANCE), "SMAR": results(SMAR)}
    table = retention(results(MIXTRAL), models)
    assert percent(table.average) == "65.7"
    assert [percent(model.average) for model in table.models] == ["53.6", "54.4", "56.9"]
    assert [percent(model.retention) for model in table.models] == ["81.6", "82.8", "86.6"]
    smar = [percent(value) for value in table.models[2].ratios.values()]
    assert smar == ["94.4", "85.1", "84.8", "89.8", "96.7", "58.0"]


def test_the_papers_gain_over_balance_is_mostly_mbpps() -> None:
    table = retention(results(MIXTRAL), {"balance": results(BALANCE), "SMAR": results(SMAR)})
    name, lead = table.lead() or ("", 0.0)
    assert (name, f"{100 * lead:.1f}") == ("SMAR", "3.8")
    name, lead = table.lead("mbpp") or ("", 0.0)
    assert (name, f"{100 * lead:.1f}") == ("SMAR", "0.4")
    text = format_retention(table)
    assert "SMAR +3.8" in text and "SMAR +0.4" in text
    assert retention(results(MIXTRAL), {"SMAR": results(SMAR)}).lead() is None


def test_the_standard_error_of_a_ratio_is_that_of_simulated_independent_scores() -> None:
    rng = np.random.default_rng(0)
    before, after = (Estimate(0.7, 0.012), Estimate(0.5, 0.02)), (Estimate(0.6, 0.015), Estimate(0.2, 0.01))
    draws = [[rng.normal(score.value, score.stderr, 400_000) for score in scores] for scores in (before, after)]
    ratios = sum(draws[1]) / sum(draws[0])
    assert ratio(mean(after), mean(before)).stderr == pytest.approx(ratios.std(), rel=0.01)
    assert ratio(after[0], before[0]).stderr == pytest.approx((draws[1][0] / draws[0][0]).std(), rel=0.01)


def test_without_a_standard_error_of_one_score_the_average_has_none() -> None:
    unknown = replace(task(0.3), stderr=None)
    before = LanguageResults("", {"mmlu": task(0.5), "bbh": unknown})
    (model,) = retention(before, {"after": before}).models
    assert model.ratios["mmlu"].stderr is not None and model.ratios["bbh"].stderr is None
    assert model.retention == Estimate(1.0, None)


def test_humaneval_and_ifeval_are_shown_but_not_averaged_unless_named() -> None:
    before = results(MIXTRAL, humaneval=task(0.4, "HumanEval"), ifeval=task(0.5, "IFEval"))
    after = results(SMAR, humaneval=task(0.5, "HumanEval"), ifeval=task(0.6, "IFEval"))
    table = retention(before, {"SMAR": after})
    assert percent(table.models[0].retention) == "86.6" and "humaneval" not in table.averaged
    assert "HumanEval (not averaged)" in format_retention(table)
    named = retention(before, {"SMAR": after}, ["mmlu", "humaneval"])
    assert percent(named.models[0].retention) == f"{100 * (0.68 + 0.5) / (0.72 + 0.4):.1f}"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"shots": 0}, "number of examples"),
        ({"version": "2.0"}, "version"),
        ({"samples": 10}, "number of questions"),
        ({"metric": "acc_norm,none"}, "metric"),
        ({"chat_template": True}, "chat template"),
        ({"prompts": "b" * 16}, "digest of the prompts"),
    ],
)
def test_a_task_that_was_asked_differently_is_refused(change: dict[str, Any], what: str) -> None:
    before = LanguageResults("", {"mmlu": task(0.5, prompts="a" * 16)})
    after = LanguageResults("", {"mmlu": replace(before.tasks["mmlu"], **change)})
    with pytest.raises(ResultsError, match=rf"mmlu cannot be compared: its {what}.* is .* before and .* in SMAR"):
        retention(before, {"SMAR": after})


def test_conversations_may_differ_by_the_models_templates() -> None:
    before = LanguageResults("", {"mmlu": task(0.5, prompts="a" * 16, chat_template=True)})
    after = LanguageResults("", {"mmlu": task(0.4, prompts="b" * 16, chat_template=True)})
    assert percent(retention(before, {"SMAR": after}).models[0].retention) == "80.0"


def test_tasks_that_only_one_side_has_are_refused_unless_others_are_chosen() -> None:
    before, after = results(MIXTRAL), results(SMAR, hellaswag=task(0.8, "hellaswag"))
    with pytest.raises(ResultsError, match=r"the results before has no score of hellaswag: .* --tasks"):
        retention(before, {"SMAR": after})
    with pytest.raises(ResultsError, match="SMAR has no score of hellaswag"):
        retention(after, {"SMAR": before})
    assert retention(before, {"SMAR": after}, ["mmlu", "mbpp"]).averaged == ["mmlu", "mbpp"]
    with pytest.raises(ResultsError, match="the results before has no score of piqa; it has mmlu"):
        retention(before, {"SMAR": after}, ["piqa"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score": 0.0}, "mmlu has no retention: its score before is 0"),
        ({"score": 12.5, "metric": "word_perplexity,none"}, "is 12.5 before, which is not a share"),
        ({"score": 0.5, "higher_is_better": False}, "not a share of right answers"),
    ],
)
def test_scores_without_a_meaningful_ratio_are_refused(values: dict[str, Any], message: str) -> None:
    before = LanguageResults("", {"mmlu": task(**values)})
    with pytest.raises(ResultsError, match=message):
        retention(before, {"SMAR": before})


@pytest.mark.parametrize(
    "content", [[], {}, {"tasks": {}}, {"tasks": {"mmlu": {"score": 1}}}, {"tasks": {"mmlu": None}}]
)
def test_files_that_hold_no_such_scores_are_refused(content: Any) -> None:
    with pytest.raises(ResultsError, match="a file"):
        parse_results(content, "a file")


@pytest.mark.parametrize("values", [{"score": float("nan")}, {"score": "0.5"}, {"samples": 0}, {"stderr": -1.0}])
def test_impossible_results_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ResultsError, match="MMLU"):
        task(**{"score": 0.5} | values)


def test_a_bar_in_a_models_name_does_not_break_the_markdown_table() -> None:
    table = retention(results(MIXTRAL), {"a|b": results(SMAR)})
    header, rule, *_ = markdown(table).splitlines()
    assert header.replace("\\|", "").count("|") == rule.count("|")


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools/retention.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_program_writes_table_json_markdown_and_figure(tmp_path) -> None:
    paths = {}
    for name, scores in (("before", MIXTRAL), ("balance", BALANCE), ("smar", SMAR)):
        content = results(scores).as_dict()
        paths[name] = tmp_path / name / "results.json"
        paths[name].parent.mkdir()
        # evaluate.py writes its other results next to these.
        paths[name].write_text(json.dumps({"vqa_accuracy": 0.5, "language": content} if name == "smar" else content))
    outputs = [tmp_path / "out" / name for name in ("table.json", "table.md", "table.png")]
    flags = [f"--{kind}={path}" for kind, path in zip(("json", "markdown", "figure"), outputs, strict=True)]
    done = start("--before", paths["before"], "--after", f"SMAR={paths['smar']}", paths["balance"], *flags)
    assert done.returncode == 0, done.stderr
    assert "86.6" in done.stdout and "SMAR +0.4" in done.stdout
    content = json.loads(outputs[0].read_text())
    assert content["after"]["SMAR"]["retention"]["value"] == pytest.approx(0.8662, abs=1e-4)
    assert content["after"]["balance"]["retention_without"]["mbpp"]["value"] == pytest.approx(0.9029, abs=1e-4)
    assert "| MBPP | 49.0 ± 1.0 | 28.4 ± 1.0 | 58.0 ± " in outputs[1].read_text()
    assert outputs[2].read_bytes().startswith(b"\x89PNG")


def test_the_programs_mistakes_are_one_sentence(tmp_path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(results(SMAR).as_dict()))
    for arguments, message in (
        (("--before", tmp_path / "missing.json", "--after", file), "missing.json cannot be read: No such file"),
        (("--before", file, "--after", file, file), "--after has two results of the name a; name them"),
        (("--before", file, "--after", file, f"--figure={tmp_path / 'a.doc'}"), "doc"),
    ):
        done = start(*arguments)
        assert done.returncode == 2 and message in done.stderr
        assert "Traceback" not in done.stderr
    assert "Table 2" in start("--help").stdout
