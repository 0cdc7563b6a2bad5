# SPDX-License-Identifier: Apache-2.0
"""VizWiz from files as published: prompts, accuracy, the server's file, and files that cannot be used."""

import json

import pytest

from megatron_smar.evaluation.benchmarks.base import BenchmarkError
from megatron_smar.evaluation.benchmarks.vizwiz import VizWiz
from tests.benchmark_files import answers, questions, refusal, skipped, write_json, write_picture

FIRST, SECOND = "VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"


def entry(image: str, replies: list, kind: str = "other") -> dict:
    given = [{"answer": reply, "answer_confidence": "yes"} for reply in replies]
    return {
        "image": image,
        "question": "What is this? Is it Red?",
        "answers": given,
        "answer_type": kind,
        "answerable": 1,
    }


@pytest.fixture
def val(tmp_path):
    entries = [entry(FIRST, ["unanswerable"] * 10, "unanswerable"), entry(SECOND, ["a can"] * 3 + ["can"] * 7)]
    write_json(tmp_path / "val.json", entries)
    for name in (FIRST, SECOND):
        write_picture(tmp_path / "val" / name)
    return VizWiz(tmp_path)


def test_the_prompt_is_llavas_with_the_question_in_lower_case(val):
    assert questions(val)[FIRST].prompt == (
        "What is this? is it red?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )


def test_accuracy_compares_the_normalized_prediction_with_the_answers_as_published(val):
    scores = val.score(answers(val, {FIRST: "Unanswerable", SECOND: "a can"}))
    # The prediction "a can" becomes "can", which 7 people answered; their 3 "a can" are not normalized: 1.
    assert scores == pytest.approx({"accuracy": 100, "accuracy/unanswerable": 100, "accuracy/other": 100})
    write_json(val.folder / "val.json", [entry(FIRST, ["a can"] * 9 + ["can"])])
    # "can" of one person: 0 when it is left out, else 1/3: 9 * 1/3 / 10 = 0.3.
    assert val.score(answers(val, {FIRST: "a can"}))["accuracy"] == pytest.approx(30)
    assert val.score(answers(val, {FIRST: ""}))["accuracy"] == 0


def test_the_test_split_has_no_score_and_a_file_for_the_server(tmp_path):
    write_json(tmp_path / "Annotations/test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "What is this?"}])
    write_picture(tmp_path / "test/VizWiz_test_00000000.jpg")
    test = VizWiz(tmp_path)
    given = answers(test, {"VizWiz_test_00000000.jpg": "Unanswerable."})
    assert test.version == "test"
    assert test.score(given) == {}
    (text,) = test.submission(given).values()
    assert json.loads(text) == [{"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}]


def test_bad_samples_are_skipped_with_the_reason(val):
    missing, no_answers = entry("VizWiz_val_00000009.jpg", ["can"] * 10), entry(SECOND, [])
    write_json(val.folder / "val.json", [entry(FIRST, ["can"] * 10), missing, no_answers, None])
    assert skipped(val) == {
        "VizWiz_val_00000009.jpg": "its picture val/VizWiz_val_00000009.jpg is missing",
        SECOND: "it has 0 reference answers, not 10",
        "entry 3": "it is of type NoneType, not a record",
    }


def test_a_folder_without_questions_or_with_both_splits_is_refused(val):
    (val.folder / "val.json").unlink()
    assert f"{val.folder / 'val.json'} does not exist" in refusal(val)
    (val.folder / "test").mkdir()
    with pytest.raises(BenchmarkError, match="leave only one of val and test there"):
        val.read()
