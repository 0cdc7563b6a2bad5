# SPDX-License-Identifier: Apache-2.0
"""VQAv2 from files as published: prompts, accuracy, the server's file, and files that cannot be used."""

import json

import pytest

from megatron_smar.evaluation.benchmarks.base import BenchmarkError
from megatron_smar.evaluation.benchmarks.vqav2 import VQAv2
from tests.benchmark_files import answers, questions, refusal, skipped, write_json, write_picture

QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


def asked(split: str, *records, version: str = "2.0") -> dict:
    return {
        "info": {"version": version},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "data_subtype": split,
        "questions": list(records),
    }


def question(number: int, image: int = 42) -> dict:
    return {"image_id": image, "question": "Is it red?", "question_id": number}


def annotation(number: int, replies: list, kind: str = "yes/no") -> dict:
    given = [{"answer": reply, "answer_confidence": "yes", "answer_id": i} for i, reply in enumerate(replies, 1)]
    return {"question_type": "is it", "answers": given, "image_id": 42, "answer_type": kind, "question_id": number}


@pytest.fixture
def val(tmp_path):
    write_json(tmp_path / QUESTIONS.format("val2014"), asked("val2014", question(42000), question(42001)))
    annotations = [annotation(42000, ["yes"] * 10), annotation(42001, ["red"] * 2 + ["pink"] * 8, "other")]
    write_json(tmp_path / ANNOTATIONS, {"data_subtype": "val2014", "annotations": annotations})
    write_picture(tmp_path / "val2014/COCO_val2014_000000000042.jpg")
    return VQAv2(tmp_path)


@pytest.fixture
def dev(tmp_path):
    write_json(tmp_path / QUESTIONS.format("test-dev2015"), asked("test-dev2015", question(7), question(8)))
    write_picture(tmp_path / "test2015/COCO_test2015_000000000042.jpg")
    return VQAv2(tmp_path)


def test_a_question_has_llavas_prompt_its_picture_and_ten_answers(val):
    first = questions(val)["42000"]
    assert first.prompt == "Is it red?\nAnswer the question using a single word or phrase."
    assert first.images == (val.folder / "val2014/COCO_val2014_000000000042.jpg",)
    assert first.answers == ("yes",) * 10
    assert first.group == "yes/no"
    assert val.version == "val2014"


def test_accuracy_is_the_average_over_the_questions_and_by_answer_type(val):
    scores = val.score(answers(val, {"42000": "Yes.", "42001": "Red"}))
    # "Yes." becomes "yes": 1. "red" of two people: (2 * 1/3 + 8 * 2/3) / 10 = 0.6.
    assert scores == pytest.approx({"accuracy": 80, "accuracy/yes/no": 100, "accuracy/other": 60})
    assert val.submission(answers(val, {"42000": "Yes."})) == {}


def test_an_empty_prediction_is_wrong_and_no_answers_have_no_score(val):
    assert val.score(answers(val, {"42000": ""}))["accuracy"] == 0
    assert val.score([]) == {}


def test_test_dev_has_no_score_and_a_file_for_the_server(dev):
    given = answers(dev, {"7": "Red.", "8": "Two"})
    assert dev.score(given) == {}
    ((name, text),) = dev.submission(given).items()
    assert name.endswith("_results.json")
    assert json.loads(text) == [{"question_id": 7, "answer": "red"}, {"question_id": 8, "answer": "2"}]


def test_the_servers_file_has_every_question_of_the_test_split(dev):
    write_json(dev.folder / QUESTIONS.format("test2015"), asked("test2015", question(7), question(9)))
    (text,) = dev.submission(answers(dev, {"7": "red"})).values()
    assert json.loads(text) == [{"question_id": 7, "answer": "red"}, {"question_id": 9, "answer": ""}]


def test_bad_samples_are_skipped_with_the_reason(val):
    records = [question(1), question(2, image=43), question(3), question(4), question(5), question(6), "text"]
    del records[2]["question"]
    records[5]["image_id"] = "42"
    write_json(val.folder / QUESTIONS.format("val2014"), asked("val2014", *records))
    annotations = [annotation(n, ["yes"] * 10) for n in (1, 2, 3)]
    annotations += [annotation(4, ["yes"] * 9 + [1]), annotation(6, ["yes"] * 10)]
    write_json(val.folder / ANNOTATIONS, {"data_subtype": "val2014", "annotations": annotations})
    assert list(questions(val)) == ["1"]
    assert skipped(val) == {
        "2": "its picture val2014/COCO_val2014_000000000043.jpg is missing",
        "3": "it has no 'question'",
        "4": "a reference answer is of type int, not a string",
        "5": "it has no annotation",
        "6": "its 'image_id' is '42', not a number",
        "entry 6": "it is of type str, not a record",
    }


def test_fewer_than_ten_answers_are_skipped_because_the_metric_needs_ten(val):
    annotations = [annotation(42000, ["yes"] * 9), annotation(42001, ["red"] * 10)]
    write_json(val.folder / ANNOTATIONS, {"data_subtype": "val2014", "annotations": annotations})
    assert skipped(val) == {"42000": "it has 9 reference answers, not 10"}


def test_files_that_are_missing_broken_or_of_another_version_are_refused(val):
    path = val.folder / QUESTIONS.format("val2014")
    good = path.read_text()
    path.write_text(good[:-10])
    assert f"{path} is not JSON" in refusal(val)
    path.write_text(json.dumps(asked("train2014", question(1))))
    assert f"{path} is for 'train2014', not for 'val2014'" in refusal(val)
    path.write_text(json.dumps(asked("val2014", question(1), version="1.0")))
    assert f"{path} is of version 1.0, not 2.0" in refusal(val)
    path.write_text("[]")
    assert f"{path} is of type list, not dict" in refusal(val)
    path.write_text(json.dumps({"data_subtype": "val2014"}))
    assert f"{path} has no list 'questions'" in refusal(val)
    path.write_text(json.dumps(asked("val2014")))
    assert f"{path} has no samples" in refusal(val)
    path.write_text(json.dumps(asked("val2014", question(1), question(1))))
    assert f"{path} has two samples 1" in refusal(val)
    path.write_bytes(b"\xff\xfe\xfd")
    assert f"{path} is not text in UTF-8" in refusal(val)
    path.unlink()
    assert f"{path} does not exist" in refusal(val)


def test_a_folder_without_its_pictures_is_refused_not_scored(val):
    (val.folder / "val2014/COCO_val2014_000000000042.jpg").unlink()
    assert "has no usable sample (42000: its picture" in refusal(val)


def test_two_splits_in_one_folder_are_refused(val):
    write_json(val.folder / QUESTIONS.format("test-dev2015"), asked("test-dev2015", question(7)))
    (val.folder / "test2015").mkdir()
    with pytest.raises(BenchmarkError, match="leave only one of val2014 and test2015 there"):
        val.read()
