# SPDX-License-Identifier: Apache-2.0
"""MM-Vet from files as published: prompts, the judge's file, and files that cannot be used."""

import json

import pytest

from megatron_smar.evaluation.benchmarks.mmvet import MMVet
from tests.benchmark_files import answers, questions, refusal, skipped, write_json, write_picture


def record(image: str = "v1_0.png", answer="-1<AND>-5") -> dict:
    question = "What is x in the equation?"
    return {"imagename": image, "question": question, "answer": answer, "capability": ["ocr", "math"]}


@pytest.fixture
def mmvet(tmp_path):
    write_json(tmp_path / "mm-vet.json", {"v1_0": record(), "v1_1": record()})
    write_picture(tmp_path / "images/v1_0.png")
    return MMVet(tmp_path)


def test_the_prompt_is_the_question_alone(mmvet):
    first = questions(mmvet)["v1_0"]
    assert first.prompt == "What is x in the equation?"
    assert first.images == (mmvet.folder / "images/v1_0.png",)


def test_there_is_no_score_but_the_file_for_the_judge(mmvet):
    given = answers(mmvet, {"v1_0": " x is -1.\n", "v1_1": ""})
    assert mmvet.score(given) == {}
    (text,) = mmvet.submission(given).values()
    assert json.loads(text) == {"v1_0": "x is -1.", "v1_1": ""}
    assert mmvet.submission([]) == {}


def test_bad_samples_are_skipped_with_the_reason(mmvet):
    write_json(mmvet.folder / "mm-vet.json", {"v1_0": record(), "v1_1": record("none.png"), "v1_2": record(answer=5)})
    assert skipped(mmvet) == {
        "v1_1": "its picture images/none.png is missing",
        "v1_2": "its 'answer' is of type int, not a string",
    }


def test_another_version_or_a_missing_file_is_refused(mmvet):
    path = write_json(mmvet.folder / "mm-vet.json", {"v2_0": record()})
    assert f"{path} has no ids v1_0, v1_1 and so on of version 1" in refusal(mmvet)
    path.unlink()
    assert f"{path} does not exist" in refusal(mmvet)
