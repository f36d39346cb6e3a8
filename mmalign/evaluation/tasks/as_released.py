"""What the scripts of Sight-Beyond-Text (47f96a3, llava/eval/mmoverall) run on every model.

LLaVA's chat template v0 with the dialogue that it begins with, whatever the model was tuned with;
sampling; at most ten new tokens; for VQAv2 and captions three demonstrations without their pictures
as earlier turns. The scripts draw the demonstrations and the samples unseeded or from torch's
generator: here a seed makes them repeatable, so their numbers are matched in distribution alone.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from mmalign.data.samples import Turn
from mmalign.data.templates import TEMPLATES, Segment, SpecialIds, Template
from mmalign.model.generate import GenerationOptions

SEED = 42
NUM_DEMONSTRATIONS = 3
OPTIONS = GenerationOptions(max_new_tokens=10, temperature=0.2, top_k=50, seed=SEED, stop=("###",))
PROMPTS = "Sight-Beyond-Text 47f96a3, as its scripts run"
_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_ANSWER = """\
Renewable energy sources are those that can be replenished naturally in a relatively short amount \
of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the \
other hand, are finite and will eventually be depleted, such as coal, oil, and natural gas. Here \
are some key differences between renewable and non-renewable energy sources:
1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy \
sources are finite and will eventually run out.
2. Environmental impact: Renewable energy sources have a much lower environmental impact than \
non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and \
other negative effects.
3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically \
have lower operational costs than non-renewable sources.
4. Reliability: Renewable energy sources are often more reliable and can be used in more remote \
locations than non-renewable sources.
5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different \
situations and needs, while non-renewable sources are more rigid and inflexible.
6. Sustainability: Renewable energy sources are more sustainable over the long term, while \
non-renewable sources are not, and their depletion can lead to economic and social instability.
"""
_OPENING = (Turn("human", _QUESTION), Turn("gpt", _ANSWER))


def _render(turns: Sequence[Turn], special: SpecialIds) -> Iterator[Segment]:
    """v0 as LLaVA chats with it: without the white space that training has around "###"."""
    for item, supervised in TEMPLATES["v0"].render([*_OPENING, *turns], special):
        if isinstance(item, str):
            end = "\n###" if supervised else "\n\n###"  # of an answer, and of the system prompt
            item = f"{item.removesuffix(end)}###" if item.endswith(end) else _TIGHT.get(item, item)
        if item != " ":
            yield item, supervised


_TIGHT = {" Human: ": "Human: ", "\n### Assistant:": "###Assistant:"}
TEMPLATE = Template(_render, stop=("###",))


def draw_demonstrations(
    pool: Sequence[tuple[str, str]], num_questions: int
) -> list[tuple[tuple[str, str], ...]]:
    """Three (question, answer) of the pool for every question."""
    random = np.random.default_rng(SEED)
    drawn = (
        random.choice(len(pool), NUM_DEMONSTRATIONS, replace=False) for _ in range(num_questions)
    )
    return [tuple(pool[i] for i in places) for places in drawn]


def drawn_rows(num_rows: int, num_drawn: int) -> list[int]:
    """num_drawn of the rows of a file, as numpy.random.seed(42) and choice draw them."""
    random = np.random.RandomState(SEED)
    return random.choice(num_rows, num_drawn, replace=False).tolist()


def parse_vqa(text: str) -> str:
    """Up to the next turn; whatever holds yes is "Yes", then whatever holds no is "No"."""
    text = re.split("Question|Answer|###|</s>", text, maxsplit=1)[0]
    if "Yes" in text or "yes" in text:
        return "Yes"
    return "No" if "No" in text or "no" in text else text
