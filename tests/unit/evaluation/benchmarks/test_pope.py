# SPDX-License-Identifier: Apache-2.0
"""POPE from files as published: prompts, the five metrics by category, and files that cannot be used."""

import pytest

from megatron_smar.evaluation.benchmarks.pope import CATEGORIES, POPE, says_yes
from tests.benchmark_files import answers, questions, refusal, skipped, write_lines, write_picture

PICTURE = "COCO_val2014_000000000042.jpg"


def record(number: int, label: str = "yes", image: str = PICTURE) -> dict:
    return {"question_id": number, "image": image, "text": "Is there a dog in the image?", "label": label}


@pytest.fixture
def pope(tmp_path):
    for category in CATEGORIES:
        records = [record(1), record(2), record(3, "no"), record(4, "no")]
        write_lines(tmp_path / f"coco/coco_pope_{category}.json", records)
    write_picture(tmp_path / "val2014" / PICTURE)
    return POPE(tmp_path)


def test_a_question_has_llavas_prompt_and_its_categorys_key(pope):
    first = questions(pope)["random/1"]
    assert first.prompt == "Is there a dog in the image?\nAnswer the question using a single word or phrase."
    assert first.images == (pope.folder / "val2014" / PICTURE,)
    assert first.group == "random"
    assert len(questions(pope)) == 12


@pytest.mark.parametrize(
    ("prediction", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("No.", False),
        ("no, there is none", False),
        ("There is not a dog", False),
        ("Yes. No doubt", True),  # the first sentence counts
        ("NO", True),  # as published: only No, no and not
        ("Nothing", True),
        ("", True),
    ],
)
def test_a_prediction_is_no_only_where_the_first_sentence_says_so(prediction, yes):
    assert says_yes(prediction) is yes


def test_the_metrics_are_averages_over_the_categories(pope):
    random = {"random/1": "Yes", "random/2": "No", "random/3": "No", "random/4": "No"}
    popular = {"popular/1": "Yes", "popular/2": "Yes", "popular/3": "Yes", "popular/4": "Yes"}
    scores = pope.score(answers(pope, random | popular))
    # random: 1 true yes of 1 said and 2 labeled: precision 1, recall 1/2, F1 = 2 * 1/2 / (3/2) = 2/3; 3 of 4 right.
    assert scores["f1/random"] == pytest.approx(100 * 2 / 3)
    assert [scores[f"{name}/random"] for name in ("accuracy", "precision", "recall", "yes_ratio")] == [75, 100, 50, 25]
    # popular: 2 true yes of 4 said and 2 labeled: precision 1/2, recall 1, F1 = 2/3; 2 of 4 right.
    assert scores["f1/popular"] == pytest.approx(100 * 2 / 3)
    assert [scores[f"{name}/popular"] for name in ("accuracy", "precision", "recall", "yes_ratio")] == [
        50,
        50,
        100,
        100,
    ]
    assert scores["f1"] == pytest.approx(100 * 2 / 3)
    assert scores["accuracy"] == 62.5
    assert "f1/adversarial" not in scores


def test_a_model_that_never_says_yes_has_an_f1_of_0(pope):
    scores = pope.score(answers(pope, {"random/1": "No", "random/3": "No"}))
    assert (scores["f1"], scores["precision"], scores["recall"], scores["accuracy"]) == (0, 0, 0, 50)
    assert pope.score([]) == {}


def test_bad_samples_are_skipped_with_the_reason(pope):
    records = [record(1), record(2, "maybe"), record(3, image="none.jpg"), {"question_id": 4}, 5]
    write_lines(pope.folder / "coco/coco_pope_random.json", records)
    assert skipped(pope) == {
        "random/2": "its label is 'maybe', neither yes nor no",
        "random/3": "its picture val2014/none.jpg is missing",
        "random/4": "it has no 'text'",
        "random/entry 4": "it is of type int, not a record",
    }


def test_a_missing_category_or_a_json_array_is_refused(pope):
    path = pope.folder / "coco/coco_pope_popular.json"
    path.write_text("[\n{}\n]\n")
    assert f"{path} has no JSON in line 1" in refusal(pope)
    path.unlink()
    assert "coco_pope_popular.json does not exist" in refusal(pope)
