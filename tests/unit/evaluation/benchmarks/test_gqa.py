# SPDX-License-Identifier: Apache-2.0
"""GQA from files as published: prompts, exact match, and files that cannot be used."""

import pytest

from megatron_smar.evaluation.benchmarks.gqa import GQA
from tests.benchmark_files import answers, questions, refusal, skipped, write_json, write_picture


def record(answer, kind: str = "verify", image: str = "n161313") -> dict:
    return {
        "imageId": image,
        "question": "Is it overcast?",
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": kind, "semantic": "global", "detailed": "weatherVerify"},
    }


@pytest.fixture
def gqa(tmp_path):
    write_json(tmp_path / "testdev_balanced_questions.json", {"1": record("no"), "2": record("sky", "query")})
    write_picture(tmp_path / "images/n161313.jpg")
    return GQA(tmp_path)


def test_a_question_has_llavas_prompt_and_its_picture(gqa):
    first = questions(gqa)["1"]
    assert first.prompt == "Is it overcast?\nAnswer the question using a single word or phrase."
    assert first.images == (gqa.folder / "images/n161313.jpg",)


def test_a_prediction_is_right_up_to_capitals_and_periods_at_its_end(gqa):
    # One of two right; the one binary question is right, the one open question is not.
    scores = gqa.score(answers(gqa, {"1": "No.", "2": "the sky"}))
    assert scores == {"accuracy": 50, "accuracy/binary": 100, "accuracy/open": 0}
    assert gqa.score(answers(gqa, {"1": "", "2": "sky"}))["accuracy"] == 50


def test_bad_samples_are_skipped_with_the_reason(gqa):
    without_types = record("no") | {"types": None}
    records = {"1": record("no"), "2": record(3), "3": record("no", image="n0"), "4": without_types, "5": record(" ")}
    write_json(gqa.folder / "testdev_balanced_questions.json", records)
    assert skipped(gqa) == {
        "2": "its 'answer' is of type int, not a string",
        "3": "its picture images/n0.jpg is missing",
        "4": "it has no 'types'",
        "5": "its 'answer' is empty",
    }


def test_questions_without_published_answers_are_refused_as_another_file(gqa):
    path = write_json(
        gqa.folder / "testdev_balanced_questions.json", {"1": {"imageId": "n161313", "question": "Is it?"}}
    )
    assert f"{path} has no usable sample (1: it has no 'types')" in refusal(gqa)
    path.unlink()
    assert f"{path} does not exist" in refusal(gqa)


def test_a_folder_in_the_place_of_the_file_is_refused(gqa):
    path = gqa.folder / "testdev_balanced_questions.json"
    path.unlink()
    path.mkdir()
    assert f"{path} cannot be read (Is a directory)" in refusal(gqa)
