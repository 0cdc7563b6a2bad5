# SPDX-License-Identifier: Apache-2.0
"""The accuracy of VQA (Antol et al., arXiv:1505.00468) as its evaluation code computes it, and its normalization.

The code is vqaEval.py of https://github.com/GT-Vision-Lab/VQA. The challenge's servers put one more step before it,
which MMF published as EvalAIAnswerProcessor and LLaVA applies to its predictions: `normalize_fully`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# As published, including entries that lower-casing puts out of reach.
CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've
    I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am
    mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
    neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
    shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
    shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
    somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
    someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
    somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
    thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
    we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
    whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
    whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
    y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
    youve:you've
    """.split()
)
NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the published code passes re.UNICODE, which is 32, where `sub` takes a count


def normalize(answer: str) -> str:
    """Returns the answer without punctuation, articles and capitals, with digits for number words.

    A punctuation mark next to a space is deleted, another one becomes a space. Periods stay before digits only.
    """
    delete_all = _COMMA_IN_NUMBER.search(answer) is not None
    result = answer
    for mark in PUNCTUATION:
        delete = delete_all or f"{mark} " in answer or f" {mark}" in answer
        result = result.replace(mark, "" if delete else " ")
    result = _PERIOD.sub("", result, count=_MOST_PERIODS)
    words = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_fully(answer: str) -> str:
    """Returns the answer as the challenge's servers normalize it: commas and question marks go first, 's is a word."""
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize(_on_one_line(answer))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns the official accuracy of VQA, between 0 and 1.

    The answers are normalized only where they are not all the same, as in the published code. A `prediction` that has
    gone through `normalize_fully`, as LLaVA's have, is thus equal to a unanimous "yes" although the model wrote "Yes.".
    """
    prediction, answers = _on_one_line(prediction), [_on_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize(prediction), [normalize(answer) for answer in answers]
    return leave_one_out(prediction, answers)


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Returns the average of min(matches / 3, 1) over all ways of leaving out one person's answer."""
    matches = sum(answer == prediction for answer in answers)
    scores = [min((matches - (answer == prediction)) / 3, 1.0) for answer in answers]
    return sum(scores) / len(scores)


def _on_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
