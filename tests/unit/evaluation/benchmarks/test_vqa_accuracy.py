# SPDX-License-Identifier: Apache-2.0
"""The accuracy of VQA and its normalization, on cases computed by hand and by its properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.evaluation.benchmarks.vqa_accuracy import (
    CONTRACTIONS,
    leave_one_out,
    normalize,
    normalize_fully,
    vqa_accuracy,
)

# At most 32 characters: from the 33rd period on, the published code stops deleting them.
TEXTS = st.text("aAnthe osx019.,?!-'/_;\t", max_size=32) | st.sampled_from(sorted(CONTRACTIONS))


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("The Red Car", "red car"),  # capitals and articles
        ("a", ""),  # an article alone
        ("two", "2"),
        ("None", "0"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),  # as published
        ("t-shirt", "t shirt"),  # a mark without a space next to it becomes a space
        ("red - blue", "red blue"),  # one with a space is deleted
        ("is it? - yes-no", "is it yesno"),  # every "-" is then
        ("1,000", "1000"),  # a comma within a number deletes all marks
        ("1,000-2", "10002"),
        ("4.5 ft.", "4.5 ft"),  # a period stays before a digit only
        (".5", ".5"),
        ("yes.", "yes"),
    ],
)
def test_an_answer_is_normalized_as_in_vqas_code(answer, normalized):
    assert normalize(answer) == normalized


def test_the_servers_step_separates_an_apostrophe_s_and_deletes_commas_and_question_marks():
    assert normalize_fully("Denny's?") == "denny 's"
    assert normalize_fully("red,white") == "redwhite"
    assert normalize_fully(" Yes.\n") == "yes"


def test_only_32_periods_are_deleted_as_in_the_published_code():
    assert normalize("." * 34) == ".."


@given(TEXTS)
def test_normalizing_twice_changes_nothing_more(answer):
    assert normalize(normalize(answer)) == normalize(answer)


@given(TEXTS)
def test_capitals_and_white_space_do_not_change_a_full_normalization(answer):
    assert normalize_fully(f" {answer.upper().replace(' ', '  ')}\n") == normalize_fully(answer.replace(" ", "  "))


def test_accuracies_by_hand():
    answers = ["red"] * 2 + ["blue"] * 8
    # Leaving out one "red" leaves 1 match, leaving out a "blue" leaves 2: (2 * 1/3 + 8 * 2/3) / 10.
    assert vqa_accuracy("red", answers) == pytest.approx(0.6)
    # 7 or 8 matches are at least 3.
    assert vqa_accuracy("blue", answers) == 1
    # One match: 0 when it is left out, else 1/3: 9 * 1/3 / 10.
    assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    # Three matches: 2/3 when one of them is left out, else 1: (3 * 2/3 + 7) / 10.
    assert vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)
    assert vqa_accuracy("green", answers) == vqa_accuracy("", answers) == 0


def test_unanimous_answers_are_compared_without_normalization_as_in_vqas_code():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1


@given(TEXTS, st.lists(TEXTS, min_size=10, max_size=10))
def test_an_accuracy_is_the_one_of_its_matches_and_never_above_1(prediction, answers):
    matches = answers.count(prediction)
    # Each of the matches leaves matches - 1 behind when it is left out, the others leave all.
    expected = (matches * min(max(matches - 1, 0) / 3, 1) + (10 - matches) * min(matches / 3, 1)) / 10
    assert leave_one_out(prediction, answers) == pytest.approx(expected)
    assert 0 <= leave_one_out(prediction, answers) <= 1
