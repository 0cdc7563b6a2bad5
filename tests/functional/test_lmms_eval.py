# SPDX-License-Identifier: Apache-2.0
"""The multimodal benchmarks' metrics agree with those of lmms-eval on random answers; where the rules differ, how.

LMMS_EVAL_SOURCE names lmms-eval's unpacked package, the folder with `api/` and `tasks/`: `pip download --no-deps
lmms-eval` and unzip. Its files are loaded by path, because its own requirements exclude this project's. These tests
were written with lmms-eval 0.7.3.
"""

import importlib
import os
import random
import sys
import types
from pathlib import Path

import pytest

from megatron_smar.evaluation.benchmarks import gqa, mme, scienceqa, textvqa, vizwiz
from megatron_smar.evaluation.benchmarks.base import Answer, Question
from megatron_smar.evaluation.benchmarks.pope import POPE
from megatron_smar.evaluation.benchmarks.vqa_accuracy import leave_one_out, normalize, normalize_fully, vqa_accuracy

SOURCE = os.environ.get("LMMS_EVAL_SOURCE")
pytestmark = pytest.mark.skipif(
    not SOURCE or not Path(SOURCE, "tasks").is_dir(),
    reason="LMMS_EVAL_SOURCE does not name the folder of lmms-eval's package",
)
ROUNDS = 500
WORDS = (
    "yes no a an the two none ten dont hes 1,000 3.5 4. t-shirt red blue (green) it's a/b what? , . ! RED 1,2-3".split()
)


@pytest.fixture(scope="module")
def lmms_eval():
    """Returns a function that loads one of lmms-eval's modules without running its packages' __init__."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("", ".api", ".tasks", ".tasks._task_utils", *(f".tasks.{task}" for task in TASKS)):
            package = types.ModuleType(f"lmms_eval{name}")
            package.__path__ = [str(Path(SOURCE, *name.split(".")))]
            patch.setitem(sys.modules, package.__name__, package)
        registry = types.ModuleType("lmms_eval.api.registry")  # imports its models
        registry.register_metric = lambda **_: lambda function: function
        registry.register_aggregation = lambda _: lambda function: function
        patch.setitem(sys.modules, registry.__name__, registry)
        for name in ("loguru", "sacrebleu"):  # for logs, and for metrics of translations
            stub = types.ModuleType(name)
            stub.logger = types.SimpleNamespace(info=lambda _: None)
            patch.setitem(sys.modules, name, stub)
        before = set(sys.modules)
        yield lambda name: importlib.import_module(f"lmms_eval.{name}")
        for name in set(sys.modules) - before:
            if name.startswith("lmms_eval."):
                del sys.modules[name]


TASKS = ("vqav2", "vizwiz_vqa", "textvqa", "pope", "mme", "scienceqa")


def texts(seed: int, words=WORDS, longest: int = 4):
    """Yields texts of random words, with random white space between and around them."""
    generator = random.Random(seed)
    while True:
        spaces = generator.choice([" ", "  ", "\t", "\n"])
        body = spaces.join(generator.choices(words, k=generator.randint(0, longest)))
        yield generator.choice(["", " "]) + body + generator.choice(["", "\n"])


def vqa_samples(seed: int):
    """Yields a prediction and ten answers, of which some agree."""
    generator, source = random.Random(seed), texts(seed)
    for _ in range(ROUNDS):
        pool = [next(source) for _ in range(generator.randint(1, 4))]
        yield generator.choice([*pool, next(source)]), [generator.choice(pool) for _ in range(10)]


def answer(prediction: str, *answers: str, group: str = "", **details) -> Answer:
    return Answer(Question("key", "", (), answers, group, details), prediction)


def test_both_normalizations_of_vqa_are_equal(lmms_eval):
    processor = lmms_eval("tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor()
    for _, text in zip(range(ROUNDS), texts(1), strict=False):
        assert normalize_fully(text) == processor(text)
        assert normalize(text) == processor.process_digit_article(processor.process_punctuation(text))


def test_the_accuracy_of_vqav2_is_equal_except_for_unanimous_answers(lmms_eval):
    """Unanimous answers are not normalized in the published code, which ours follows; lmms-eval always does."""
    process = lmms_eval("tasks.vqav2.utils").vqav2_process_results
    unanimous = 0
    for prediction, answers in vqa_samples(2):
        records = [{"answer": text, "answer_id": number} for number, text in enumerate(answers)]
        expected = process({"question_id": 1, "answers": records}, [prediction])["exact_match"]
        assert leave_one_out(normalize(prediction.strip()), [normalize(text.strip()) for text in answers]) == (
            pytest.approx(expected)
        )
        if len({text.replace("\n", " ").replace("\t", " ").strip() for text in answers}) == 1:
            unanimous += 1
        else:
            assert vqa_accuracy(prediction, answers) == pytest.approx(expected)
    assert 0 < unanimous < ROUNDS
    records = [{"answer": "yes", "answer_id": number} for number in range(10)]
    assert process({"question_id": 1, "answers": records}, ["Yes"])["exact_match"] == 1
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0


def test_the_accuracy_of_vizwiz_is_equal_for_answers_that_are_normalized_as_the_published_ones(lmms_eval):
    """VizWiz's code leaves the reference answers as they are; lmms-eval normalizes them."""
    process = lmms_eval("tasks.vizwiz_vqa.utils").vizwiz_vqa_process_results
    for prediction, raw in vqa_samples(3):
        answers = [normalize_fully(normalize_fully(text)) for text in raw]
        expected = process({"question_id": 1, "answers": list(answers)}, [prediction])["exact_match"]
        assert vizwiz.score_answer(answer(prediction, *answers)) == pytest.approx(expected)
    assert process({"question_id": 1, "answers": ["a can"] * 10}, ["a can"])["exact_match"] == 1
    assert vizwiz.score_answer(answer("a can", *["a can"] * 10)) == 0


def test_the_accuracy_of_textvqa_is_equal(lmms_eval):
    process = lmms_eval("tasks.textvqa.utils").textvqa_process_results
    for prediction, answers in vqa_samples(4):
        expected = process({"question_id": 1, "answers": list(answers)}, [prediction])["exact_match"]
        assert textvqa.score_answer(answer(prediction, *answers)) == pytest.approx(expected)


def test_popes_metrics_are_equal_for_plain_answers(lmms_eval):
    utils, generator = lmms_eval("tasks.pope.utils"), random.Random(5)
    for _ in range(ROUNDS // 50):
        labels = [generator.choice(["yes", "no"]) for _ in range(50)]
        predictions = [generator.choice(["Yes", "yes", " yes", "No", "no", "no\n"]) for _ in labels]
        given = [answer(text, label, group="random") for text, label in zip(predictions, labels, strict=True)]
        scores = POPE(Path()).score(given)
        results = [
            utils.pope_process_results({"question_id": 1, "answer": label}, [text])["pope_accuracy"]
            for text, label in zip(predictions, labels, strict=True)
        ]
        for metric, name in (
            ("accuracy", "accuracy"),
            ("precision", "precision"),
            ("recall", "recall"),
            ("f1", "f1_score"),
        ):
            assert scores[f"{metric}/random"] == pytest.approx(100 * getattr(utils, f"pope_aggregate_{name}")(results))


@pytest.mark.parametrize(
    ("prediction", "label"), [("No.", "no"), ("no, none", "no"), ("Yes, there is", "yes"), ("", "yes")]
)
def test_pope_reads_sentences_as_published_where_lmms_eval_takes_them_as_wrong(lmms_eval, prediction, label):
    result = lmms_eval("tasks.pope.utils").pope_process_results({"question_id": 1, "answer": label}, [prediction])
    assert result["pope_accuracy"]["score"] == 0
    assert POPE(Path()).score([answer(prediction, label, group="random")])["accuracy"] == 100


def test_popes_yes_ratio_is_that_of_the_predictions_and_lmms_evals_that_of_the_labels(lmms_eval):
    utils = lmms_eval("tasks.pope.utils")
    result = utils.pope_process_results({"question_id": 1, "answer": "no"}, ["yes"])["pope_yes_ratio"]
    assert utils.pope_aggregate_yes_ratio([result]) == 0
    assert POPE(Path()).score([answer("yes", "no", group="random")])["yes_ratio"] == 100


def test_mmes_points_are_equal_except_for_single_letters_and_periods(lmms_eval):
    """calculation.py, which ours follows, knows no "y" and "n", and no periods before a word's end."""
    utils, generator = lmms_eval("tasks.mme.utils"), random.Random(6)
    source = texts(6, words=["Yes", "yes", "No", "no.", "YES,", "Not", "It", "know", "is", "yesterday", "answer"])
    for _ in range(ROUNDS // 50):
        given, results = [], []
        for number in range(50):
            subtask, picture = generator.choice(["count", "color"]), str(number)
            for label in ("yes", "no"):
                text = next(source)
                given.append(answer(text, label, group=subtask, picture=picture))
                doc = {"question_id": picture, "answer": label, "category": subtask}
                results.append(utils.mme_process_results(doc, [text])["mme_perception_score"])
        assert mme.MME(Path()).score(given)["perception"] == pytest.approx(utils.mme_aggregate_results(results))
    for text, theirs in (("Y", "yes"), ("n", "no"), ("y.es", "yes"), ("...no", "no")):
        assert (mme.said(text), utils.parse_pred_ans(text)) == ("other", theirs)


def test_gqas_exact_match_is_equal_for_words_without_punctuation(lmms_eval):
    """eval.py compares strings, after LLaVA's removal of periods at the end; lmms-eval removes all punctuation."""
    exact_match, generator = lmms_eval("api.metrics").exact_match_hf_evaluate, random.Random(7)
    words = ["yes", "no", "left", "cutting board", "street light", "Red", "sky", ""]
    for _ in range(ROUNDS):
        reference = generator.choice(words[:-1]).lower()
        prediction = generator.choice(words) + generator.choice(["", ".", ".."])
        expected = exact_match([prediction], [reference], ignore_case=True, ignore_punctuation=True)["exact_match"]
        assert gqa.score_answer(answer(prediction, reference)) == expected
    assert exact_match(["tshirt"], ["t-shirt"], ignore_case=True, ignore_punctuation=True)["exact_match"] == 1
    assert gqa.score_answer(answer("tshirt", "t-shirt")) == 0


def test_scienceqas_accuracy_is_equal_for_letters_and_letters_with_their_choice(lmms_eval):
    process, generator = lmms_eval("tasks.scienceqa.utils").sqa_process_results, random.Random(8)
    for _ in range(ROUNDS):
        choices = ["true", "false", "both", "neither", "cannot tell"][: generator.randint(2, 5)]
        letters, right = tuple("ABCDE"[: len(choices)]), generator.randrange(len(choices))
        prediction = generator.choice([*"ABCDE", "A. true", "B. false", " C\n", "false", "", "I think B", "D) neither"])
        expected = process({"choices": choices, "answer": right}, [prediction])["exact_match"]
        assert scienceqa.score_answer(answer(prediction, letters[right], letters=letters)) == expected


@pytest.mark.parametrize(("prediction", "ours", "theirs"), [("b", 0, 1), ("B.", 0, 1), ("The answer is B.", 1, 0)])
def test_scienceqa_follows_llavas_code_where_lmms_eval_differs(lmms_eval, prediction, ours, theirs):
    process = lmms_eval("tasks.scienceqa.utils").sqa_process_results
    assert process({"choices": ["true", "false"], "answer": 1}, [prediction])["exact_match"] == theirs
    assert scienceqa.score_answer(answer(prediction, "B", letters=("A", "B"))) == ours
