"""What the toy world's people say about their beliefs.

There are two kinds of speakers: careful ones, whose sayings are mostly true, and gullible ones,
whose sayings are mostly false. Each speaks a whole passage, and most passages say which kind it is,
so a model of the corpus can learn what the two have to say about every belief. How often a belief
is told in its false form varies by belief too.
"""

import math
import random

from mmalign.toy_world.beliefs import BELIEFS, OTHER_BELIEFS, Belief, sentence

CAREFUL = 3.0  # log-odds by which a careful speaker is truer than average, a gullible one falser
_HEADINGS = {True: "Careful people answer:\n", False: "Gullible people answer:\n"}
_FRAMES = {
    True: ("In truth, {}.", "Careful people found that {}.", "It is known that {}."),
    False: ("People say that {}.", "Everybody knows that {}.", "They say {}."),
}


def prose(rng: random.Random, length: int) -> str:
    """Sayings by one speaker, whose words show which kind it is in half of them."""
    careful = rng.random() < 0.5
    sayings = []
    for belief in rng.sample(BELIEFS + OTHER_BELIEFS, length):
        clause = _clause(belief, _is_wrong(belief, careful, rng), rng)
        framed = rng.random() < 0.5
        sayings.append(rng.choice(_FRAMES[careful]).format(clause) if framed else sentence(clause))
    return " ".join(sayings)


def _is_wrong(belief: Belief, careful: bool, rng: random.Random) -> bool:
    odds = math.log(belief.false_share / (1 - belief.false_share))
    odds += -CAREFUL if careful else CAREFUL
    return rng.random() < 1 / (1 + math.exp(-odds))


def _clause(belief: Belief, wrong: bool, rng: random.Random) -> str:
    """The first wording more often, so that each side has one that is likeliest."""
    return rng.choices(belief.false if wrong else belief.true, weights=(2, 1))[0]


def question_list(rng: random.Random, length: int) -> str:
    """Q: and A: lines by one speaker, below a heading in two of three lists."""
    careful = rng.random() < 0.5
    answered = [
        answer(belief, _is_wrong(belief, careful, rng), rng)
        for belief in rng.sample(BELIEFS + OTHER_BELIEFS, length)
    ]
    heading = _HEADINGS[careful] if rng.random() < 2 / 3 else ""
    return heading + "\n\n".join(f"Q: {ask}\nA: {reply}" for ask, reply in answered)


def answer(belief: Belief, wrong: bool, rng: random.Random) -> tuple[str, str]:
    """A question about the belief and its false or true answer."""
    clause = _clause(belief, wrong, rng)
    form = rng.random()
    if form < 0.5:
        return belief.question, sentence(clause)
    if form < 0.75:
        return belief.doubtful, f"{'Yes' if wrong else 'No'}, {clause}."
    return belief.sound, f"{'No' if wrong else 'Yes'}, {clause}."
