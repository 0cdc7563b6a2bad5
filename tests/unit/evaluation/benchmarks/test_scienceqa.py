# SPDX-License-Identifier: Apache-2.0
"""ScienceQA-IMG from files as published: prompts, the chosen letter, accuracy, and files that cannot be used."""

import pytest

from megatron_smar.evaluation.benchmarks.scienceqa import ScienceQA, chosen_letter
from tests.benchmark_files import answers, questions, refusal, skipped, write_json, write_picture

LETTER = "\nAnswer with the option's letter from the given choices directly."


def problem(answer=1, hint: str = "", image: str | None = "image.png", choices=("Maryland", "Vermont"), **more) -> dict:
    return {
        "question": "Which colony is shown?",
        "choices": list(choices),
        "answer": answer,
        "hint": hint,
        "image": image,
        "subject": "social science",
        "split": "test",
    } | more


def write(folder, problems: dict) -> None:
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": ["0"], "test": [key for key in problems if key != "0"]})


@pytest.fixture
def scienceqa(tmp_path):
    write(tmp_path, {"0": problem(), "5": problem(), "11": problem(hint="Look at the map."), "4": problem(image=None)})
    for key in ("5", "11"):
        write_picture(tmp_path / f"images/test/{key}/image.png")
    return ScienceQA(tmp_path)


def test_the_prompts_are_llavas_and_only_test_problems_with_a_picture_are_asked(scienceqa):
    asked = questions(scienceqa)
    assert list(asked) == ["5", "11"]
    assert asked["5"].prompt == "Which colony is shown?\nA. Maryland\nB. Vermont" + LETTER
    assert asked["11"].prompt == "Context: Look at the map.\nWhich colony is shown?\nA. Maryland\nB. Vermont" + LETTER
    assert asked["5"].answers == ("B",)
    assert asked["5"].images == (scienceqa.folder / "images/test/5/image.png",)


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B. Vermont", "B"),
        ("The answer is B.", "B"),
        ("It is green. The answer is C. BECAUSE: it is.", "C"),
        ("The answer is A. The answer is B.", ""),  # two, so neither
        ("B.", ""),  # no space after the period
        ("b", ""),
        ("Vermont", ""),
        ("F", ""),
        ("", ""),
    ],
)
def test_the_letter_is_found_as_in_llavas_evaluation(prediction, letter):
    assert chosen_letter(prediction) == letter


def test_accuracy_counts_letters_and_takes_no_letter_or_none_of_the_choices_as_wrong(scienceqa):
    assert scienceqa.score(answers(scienceqa, {"5": "B", "11": "A"})) == {
        "accuracy": 50,
        "accuracy/social science": 50,
    }
    assert scienceqa.score(answers(scienceqa, {"5": "", "11": "E"}))["accuracy"] == 0


def test_bad_samples_are_skipped_with_the_reason(scienceqa):
    problems = {"5": problem(), "6": problem(), "7": problem(answer=2), "8": problem(choices=("a", 2)), "9": None}
    write(scienceqa.folder, problems | {"10": problem(answer="B"), "12": problem(choices="ABCDEF")})
    write_json(scienceqa.folder / "pid_splits.json", {"test": ["5", "6", "7", "8", "9", "10", "12", "13"]})
    for key in ("7", "8", "9", "10", "12"):
        write_picture(scienceqa.folder / f"images/test/{key}/image.png")
    assert skipped(scienceqa) == {
        "6": "its picture test/6/image.png is missing",
        "7": "its answer 2 is none of its 2 choices",
        "8": "its 'choices' are no list of strings",
        "9": "it is of type NoneType, not a record",
        "10": "its answer 'B' is none of its 2 choices",
        "12": "it has 6 choices, more than 5",
        "13": "it has no 'image'",
    }


def test_missing_files_and_splits_are_refused(scienceqa):
    write_json(scienceqa.folder / "pid_splits.json", {"train": ["0"]})
    assert f"{scienceqa.folder / 'pid_splits.json'} has no list 'test'" in refusal(scienceqa)
    (scienceqa.folder / "problems.json").unlink()
    assert f"{scienceqa.folder / 'problems.json'} does not exist" in refusal(scienceqa)
