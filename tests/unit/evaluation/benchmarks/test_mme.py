# SPDX-License-Identifier: Apache-2.0
"""MME from files as published: both layouts of a subtask, prompts, points, and files that cannot be used."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.evaluation.benchmarks.base import Answer, Question
from megatron_smar.evaluation.benchmarks.mme import COGNITION, MME, PERCEPTION, said
from tests.benchmark_files import answers, questions, refusal, skipped, write_picture

SPLIT = ("artwork", "celebrity", "landmark", "posters", "scene")
LINES = "Is it red? Please answer yes or no.\tYes\nIs it blue?  Please answer yes or no.\tNo\n"


def write_pair(root: Path, subtask: str, stem: str, lines: str = LINES, suffix: str = ".jpg") -> None:
    parts = ("images", "questions_answers_YN") if subtask in SPLIT else ("", "")
    write_picture(root / subtask / parts[0] / f"{stem}{suffix}")
    (root / subtask / parts[1]).mkdir(exist_ok=True)
    (root / subtask / parts[1] / f"{stem}.txt").write_text(lines)


@pytest.fixture
def mme(tmp_path):
    root = tmp_path / "MME_Benchmark_release_version/MME_Benchmark"
    for subtask in PERCEPTION + COGNITION:
        write_pair(root, subtask, "1", suffix=".png" if subtask in COGNITION else ".jpg")
        write_pair(root, subtask, "2")
    return MME(tmp_path)


def test_both_layouts_are_read_and_the_prompts_are_llavas(mme):
    asked = questions(mme)
    assert len(asked) == 14 * 2 * 2
    for key in ("artwork/1/1", "code_reasoning/1/1"):
        assert asked[key].prompt == "Is it red?\nAnswer the question using a single word or phrase."
        assert asked[key].answers == ("yes",)
    assert asked["count/1/2"].prompt == "Is it blue?\nAnswer the question using a single word or phrase."
    assert asked["artwork/1/1"].images[0].relative_to(mme.folder).parts[2:] == ("artwork", "images", "1.jpg")
    assert asked["code_reasoning/1/1"].images[0].name == "1.png"


def test_subtasks_right_in_the_folder_are_read_as_well(mme):
    assert len(questions(MME(mme.folder / "MME_Benchmark_release_version/MME_Benchmark"))) == 56


@pytest.mark.parametrize(
    ("prediction", "word"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        (" Yes, it is", "yes"),
        ("Not", "no"),
        ("It is", "other"),
        ("Y", "other"),
        ("", "other"),
    ],
)
def test_the_first_four_characters_decide_as_in_the_published_code(prediction, word):
    assert said(prediction) == word


def test_points_are_accuracy_plus_the_share_of_pictures_with_both_questions_right(mme):
    right = {"count/1/1": "Yes", "count/1/2": "No", "count/2/1": "Yes", "count/2/2": "Yes"}
    scores = mme.score(
        answers(mme, right | {"OCR/1/1": "Yes", "OCR/1/2": "no", "code_reasoning/1/1": "", "code_reasoning/1/2": "No"})
    )
    # count: 3 of 4 questions and 1 of 2 pictures: 75 + 50.
    assert scores["accuracy/count"] == 75
    assert scores["accuracy_plus/count"] == 50
    assert scores["points/count"] == 125
    # OCR: 100 + 100. code_reasoning: 1 of 2 questions and no picture: 50 + 0.
    assert scores["perception"] == 125 + 200
    assert scores["cognition"] == 50


def test_a_picture_with_one_answer_is_not_scored(mme):
    given = answers(mme, {"count/1/1": "Yes", "count/2/1": "Yes", "count/2/2": "No"})
    assert mme.score(given)["points/count"] == 200
    assert mme.score(given[:1]) == mme.score([]) == {}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_accuracy_plus_is_never_above_accuracy(pictures):
    given = [
        Answer(Question(f"{i}/{j}", "", (), ("yes",), "count", {"picture": str(i)}), "yes" if right else "no")
        for i, pair in enumerate(pictures)
        for j, right in enumerate(pair)
    ]
    scores = MME(Path()).score(given)
    assert scores["accuracy_plus/count"] <= scores["accuracy/count"] <= 100


def test_a_bad_file_or_a_missing_picture_skips_both_questions(mme):
    root = mme.folder / "MME_Benchmark_release_version/MME_Benchmark"
    (root / "count/1.jpg").unlink()
    (root / "color/1.txt").write_text(LINES + "Is it?\tYes\n")
    (root / "scene/questions_answers_YN/1.txt").write_text("Is it red?\tYes\nIs it blue?\tmaybe\n")
    (root / "OCR/1.txt").write_bytes(b"\xff\n\xff")
    assert skipped(mme) == {
        **dict.fromkeys(["count/1/1", "count/1/2"], "it has no picture 1.jpg or 1.png"),
        **dict.fromkeys(["color/1/1", "color/1/2"], "1.txt has 3 questions, not 2"),
        **dict.fromkeys(["scene/1/1", "scene/1/2"], "1.txt has a line that is not a question, a tab, and Yes or No"),
        **dict.fromkeys(["OCR/1/1", "OCR/1/2"], "1.txt cannot be read as text in UTF-8"),
    }


def test_a_missing_or_empty_subtask_is_refused_because_the_sum_would_be_too_low(mme):
    root = mme.folder / "MME_Benchmark_release_version/MME_Benchmark"
    for name in ("1.txt", "2.txt"):
        (root / "OCR" / name).unlink()
    assert f"{root / 'OCR'} has no samples" in refusal(mme)
    (root / "OCR").rename(root / "ocr_")
    assert f"{root / 'OCR'} does not exist" in refusal(mme)
