"""VQA accuracy, as in the official evaluation (github.com/GT-Vision-Lab/VQA, a013f00).

An answer counts min(1, matches / 3) among the other nine annotators, averaged over the ten, after
both sides are normalised. Two readings exist:

    official   the published code: where all annotators agree, nothing is normalised, so "Yes"
               against ten times "yes" counts 0
    standard   both sides are always normalised
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

Reading = Literal["official", "standard"]

_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(i) for i, word in enumerate(_NUMBERS.split())} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32  # the official code passes re.UNICODE, which is 32, as the count
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_REPAIRED = (
    {  # each with one of its apostrophes missing
        whole[:at] + whole[at + 1 :]: whole
        for whole in _CONTRACTIONS.split()
        for at in range(len(whole))
        if whole[at] == "'"
    }
    | {"somebody'd": "somebodyd"}
)  # so in the official table


def normalise_answer(text: str) -> str:
    """Punctuation, capitals, articles, number words and missing apostrophes of a short answer."""
    text = _trim(text)
    kept = text
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    for sign in _PUNCTUATION:
        alone = f"{sign} " in text or f" {sign}" in text  # of the text as it was
        kept = kept.replace(sign, "" if alone or has_number else " ")
    kept = _STOP.sub("", kept, count=_MOST_STOPS)
    words = (_DIGITS.get(word, word) for word in kept.lower().split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str], reading: Reading) -> float:
    """0 to 1; answers: those of the annotators, ten of them in VQA."""
    prediction, answers = normalised(prediction, answers, reading)
    n, k = len(answers), answers.count(prediction)
    # leaving out an annotator leaves k - 1 matches for those who match, k for the others
    return (k * min(1.0, (k - 1) / 3) + (n - k) * min(1.0, k / 3)) / n


def normalised(prediction: str, answers: Sequence[str], reading: Reading) -> tuple[str, list[str]]:
    """What is compared: the prediction, and every annotator's answer."""
    prediction, answers = _trim(prediction), [_trim(x) for x in answers]
    if reading == "official" and len(set(answers)) == 1:
        return prediction, answers
    return normalise_answer(prediction), [normalise_answer(x) for x in answers]


def most_common_answer(answers: Sequence[str]) -> str:
    """Of all annotators' answers, normalised; the first of those that are equally common."""
    return Counter(normalise_answer(x) for x in answers).most_common(1)[0][0]


def _trim(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
