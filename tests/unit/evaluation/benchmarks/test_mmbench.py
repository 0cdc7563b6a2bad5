# SPDX-License-Identifier: Apache-2.0
"""MMBench from a table as published: prompts, the chosen option, circular accuracy, and tables that cannot be used."""

import base64
import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.evaluation.benchmarks.base import Answer, Question
from megatron_smar.evaluation.benchmarks.mmbench import MMBench, chosen_option
from tests.benchmark_files import answers, questions, refusal, skipped, write_picture

COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
COLUMNS += ["comment", "split"]
OPTIONS = {"A": "a cat", "B": "a dog", "C": "a cow"}
LETTER = "\nAnswer with the option's letter from the given choices directly."


def row(index, answer: str, options: tuple[str, ...], image: str, hint: str = "", category: str = "animals") -> dict:
    cells = dict(zip("ABCD", options, strict=False))
    cells |= {"index": index, "question": "Which one?", "hint": hint, "answer": answer, "category": category}
    return cells | {"image": image, "split": "dev"}


def write(path: Path, rows: list[dict], columns: list[str] = COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def picture(tmp_path):
    return base64.b64encode(write_picture(tmp_path / "any.png").read_bytes()).decode()


@pytest.fixture
def rows(picture):
    return [
        row(7, "A", ("a cat", "a dog"), picture, hint="Look.\nWell.", category="pets"),
        row(8, "C", ("x", "y", "z"), picture, hint="nan"),
        row(1_000_007, "B", ("a dog", "a cat"), "7", category="pets"),  # the picture of row 7
        row(1_000_008, "A", ("z", "x", "y"), "8"),
    ]


@pytest.fixture
def mmbench(tmp_path, rows):
    write(tmp_path / "mmbench_dev_20230712.tsv", rows)
    return MMBench(tmp_path)


def test_the_prompts_are_llavas_with_the_hint_if_there_is_one(mmbench):
    asked = questions(mmbench)
    assert asked["7"].prompt == "Look.\nWell.\nWhich one?\nA. a cat\nB. a dog" + LETTER
    assert asked["1000008"].prompt == "Which one?\nA. z\nB. x\nC. y" + LETTER
    assert asked["7"].images == asked["1000007"].images == ((mmbench.folder / "any.png").read_bytes(),)
    assert mmbench.version == "mmbench_dev_20230712"


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("B. a dog", "B"),
        ("(C)", "C"),
        ("The answer is **A**.", "A"),
        ("it must be a dog", "B"),  # the text of one option
        ("a cat or a dog", ""),  # of two
        ("A or B", ""),
        ("A large animal that we see is there", ""),  # an article, far from the end
        ("D", ""),  # no option
        ("Z", ""),
        ("Cannot determine the answer, perhaps B", ""),
        ("a cat", "A"),
        ("", ""),
    ],
)
def test_the_option_is_found_as_in_vlmevalkit_without_a_judge(prediction, letter):
    assert chosen_option(prediction, OPTIONS) == letter


def test_a_question_is_right_only_if_all_its_rotations_are(mmbench):
    scores = mmbench.score(answers(mmbench, {"7": "A", "1000007": "B", "8": "C", "1000008": "C"}))
    # Question 7 is right in both rotations, question 8 only in the first: circular 1 of 2, plain 2 of 2.
    assert scores == {"accuracy": 50, "accuracy/pets": 100, "accuracy/animals": 0, "plain_accuracy": 100}
    assert mmbench.score(answers(mmbench, {"7": "", "1000007": "B"}))["accuracy"] == 0
    assert mmbench.score([]) == {}


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=8))
def test_circular_accuracy_is_never_above_plain_accuracy(groups):
    details = {"options": OPTIONS, "question": ""}
    given = [
        Answer(Question(str(k * 1_000_000 + i), "", (), ("A",), "", details), "A" if right else "B")
        for i, group in enumerate(groups)
        for k, right in enumerate(group)
    ]
    scores = MMBench(Path()).score(given)
    assert scores["accuracy"] <= scores["plain_accuracy"]


def test_the_servers_table_has_the_predictions(mmbench):
    (text,) = mmbench.submission(answers(mmbench, {"7": "A", "1000007": "a\ncat"})).values()
    table = list(csv.DictReader(io.StringIO(text), delimiter="\t"))
    assert [(line["index"], line["B"], line["C"], line["prediction"]) for line in table] == [
        ("7", "a dog", "", "A"),
        ("1000007", "a cat", "", "a\ncat"),
    ]


def test_the_test_split_has_no_score_and_a_table_for_the_server(mmbench, rows):
    (mmbench.folder / "mmbench_dev_20230712.tsv").unlink()
    write(mmbench.folder / "MMBench_TEST_EN.tsv", rows, [column for column in COLUMNS if column != "answer"])
    given = answers(mmbench, {"7": "A"})
    assert mmbench.score(given) == {}
    assert "\tA\t\n" in next(iter(mmbench.submission(given).values()))


def test_all_rotations_of_a_question_are_skipped_with_a_bad_one(mmbench, rows, picture):
    rows[2]["image"] = "!"
    rows += [row(9, "D", ("x", "y"), picture), row(10, "A", ("x",), picture), row("x1", "A", ("x", "y"), picture)]
    rows += [row(11, "A", ("x", "y"), "")]
    write(mmbench.folder / "mmbench_dev_20230712.tsv", rows)
    assert skipped(mmbench) == {
        "7": "its rotation 1000007 is skipped (its picture is missing or not in base64)",
        "1000007": "its picture is missing or not in base64",
        "9": "its answer 'D' is none of its options",
        "10": "it has 1 options",
        "x1": "its index 'x1' is not a number",
        "11": "its picture is missing or not in base64",
    }


def test_tables_that_are_missing_double_or_of_another_kind_are_refused(mmbench, rows):
    path = mmbench.folder / "mmbench_dev_20230712.tsv"
    write(path, rows[:2])
    assert f"{path} has no rotations of the options" in refusal(mmbench)
    write(path, rows, [column for column in COLUMNS if column not in ("answer", "image")])
    assert f"{path} has no column image, answer" in refusal(mmbench)
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    assert f"{path} is not a table in UTF-8 separated by tabs" in refusal(mmbench)
    write(mmbench.folder / "MMBench_DEV_EN.tsv", rows)
    assert f"{path} is not the only table, MMBench_DEV_EN.tsv is there too" in refusal(mmbench)
    path.unlink()
    (mmbench.folder / "MMBench_DEV_EN.tsv").unlink()
    assert f"{path} does not exist" in refusal(mmbench)
