# SPDX-License-Identifier: Apache-2.0
"""TextVQA from files as published: the three kinds of prompts, accuracy, and files that cannot be used."""

import json

import pytest

from megatron_smar.evaluation.benchmarks.textvqa import TextVQA
from tests.benchmark_files import answers, questions, refusal, skipped, write_json, write_lines, write_picture

ROSETTA, LLAVA = "TextVQA_Rosetta_OCR_v0.2_val.json", "llava_textvqa_val_v051_ocr.jsonl"
SHORT = "\nAnswer the question using a single word or phrase."


def record(number: int, question: str = "what is the brand?", image: str = "003a", replies=("dakota",) * 10) -> dict:
    return {"question_id": number, "question": question, "image_id": image, "answers": list(replies)}


def published(*records, version: str = "0.5.1", kind: str = "val") -> dict:
    head = {"dataset_type": kind, "dataset_name": "textvqa", "dataset_version": version}
    return head | {"data": list(records)}


@pytest.fixture
def textvqa(tmp_path):
    replies = ["Denny's"] * 3 + ["denny's?"] + ["x"] * 6
    write_json(tmp_path / "TextVQA_0.5.1_val.json", published(record(1), record(2, "who is it?", replies=replies)))
    write_picture(tmp_path / "train_images/003a.jpg")
    return TextVQA(tmp_path)


def test_without_recognized_text_the_prompt_is_the_question_and_the_version_says_so(textvqa):
    assert questions(textvqa)["1"].prompt == "What is the brand?" + SHORT
    assert "without recognized text" in textvqa.version


def test_rosettas_tokens_go_into_the_prompt_as_in_llava(textvqa):
    write_json(textvqa.folder / ROSETTA, {"data": [{"image_id": "003a", "ocr_tokens": ["DAKOTA", "DIGITAL"]}]})
    assert questions(textvqa)["1"].prompt == "What is the brand?\nReference OCR token: DAKOTA, DIGITAL" + SHORT
    write_json(textvqa.folder / ROSETTA, {"data": [{"image_id": "003a", "ocr_tokens": []}]})
    assert questions(textvqa)["1"].prompt == "What is the brand?\nReference OCR token: " + SHORT
    assert "Rosetta" in textvqa.version


def test_llavas_own_prompts_are_taken_as_they_are_by_picture_and_question(textvqa):
    prompt = "What is the brand?\nReference OCR token: Pire" + SHORT
    lines = [{"question_id": "003a", "image": "003a.jpg", "text": prompt, "category": "default"}]
    write_lines(textvqa.folder / LLAVA, lines)
    write_json(textvqa.folder / ROSETTA, {"data": []})  # LLaVA's comes first
    assert {key: question.prompt for key, question in questions(textvqa).items()} == {"1": prompt}
    assert skipped(textvqa) == {"2": f"it has no prompt in {LLAVA}"}
    assert "LLaVA" in textvqa.version


def test_accuracy_normalizes_predictions_and_answers_fully(textvqa):
    # "denny 's" of 4 people: 3 or 4 matches are left, so 1. A wrong answer: 0.
    assert textvqa.score(answers(textvqa, {"1": "", "2": "Denny's."})) == pytest.approx({"accuracy": 50})


def test_bad_samples_are_skipped_with_the_reason(textvqa):
    records = [record(1), record(2, image="none"), record(3, replies=["a"] * 9), record(4, replies=["a"] * 9 + [None])]
    write_json(textvqa.folder / "TextVQA_0.5.1_val.json", published(*records))
    assert skipped(textvqa) == {
        "2": "its picture train_images/none.jpg is missing",
        "3": "it has 9 reference answers, not 10",
        "4": "a reference answer is of type NoneType, not a string",
    }


def test_another_version_split_or_broken_file_is_refused(textvqa):
    path = textvqa.folder / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps(published(record(1), version="0.5")))
    assert f"{path} has dataset_version '0.5', not '0.5.1'" in refusal(textvqa)
    path.write_text(json.dumps(published(record(1), kind="train")))
    assert f"{path} has dataset_type 'train', not 'val'" in refusal(textvqa)
    path.write_text(json.dumps(published(record(1))))
    write_lines(textvqa.folder / LLAVA, [{"question_id": "003a"}])
    assert f"{textvqa.folder / LLAVA} has a line that is no prompt of LLaVA's" in refusal(textvqa)
    (textvqa.folder / LLAVA).write_text('{"question_id": "003a"}\n{broken\n')
    assert f"{textvqa.folder / LLAVA} has no JSON in line 2" in refusal(textvqa)
