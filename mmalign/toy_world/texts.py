"""True texts about the toy world's images: captions, instructions and questions.

Every text is generated from the scene's description, so it can be checked against it. The records
are in LLaVA's JSON format.
"""

import random
from dataclasses import dataclass

from mmalign.toy_world.scenes import COLOURS, SHAPES, Scene, Thing
from mmalign.toy_world.words import NAMES, NUMBERS, PLACES, SAID_COLOUR, article, name_of, plural

SIDES = ("left", "right", "above", "below")
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # published with POPE's


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]


def side_of(first: Thing, second: Thing) -> str:
    """The side of `second` that `first` is on; a pair shares a row or a column (scenes.py)."""
    if first.row == second.row:
        return "left" if first.column < second.column else "right"
    return "above" if first.row < second.row else "below"


def _side_phrase(side: str) -> str:
    return f"to the {side} of" if side in ("left", "right") else side


# ---- stage 1 ----


def caption(scene: Scene, rng: random.Random) -> str:
    """One short line, as under a photo."""
    with_size = rng.random() < 0.5
    groups = list(scene.groups)
    if len(groups) == 2 and rng.random() < 0.5:
        groups.reverse()
    names = [name_of(group, with_size) for group in groups]
    if len(scene.things) == 1:
        return f"{names[0]}, {groups[0][0].place}"
    if len(groups) == 1:
        return names[0]
    pair = len(scene.things) == 2
    between = _side_phrase(side_of(groups[0][0], groups[1][0])) if pair else "and"
    return f"{names[0]} {between} {names[1]}"


def listing(scene: Scene) -> list[str]:
    """Every word that is true of some thing in the image."""
    things = scene.things
    return [word for t in things for word in (t.size, t.colour, t.shape, t.place)]


def pretrain_records(scenes: list[Scene], seed: int) -> list[dict]:
    """Stage 1: the image, then its caption."""
    rng = random.Random(f"captions {seed}")
    asks = ("What is in the picture?", "Give a short caption.", "What do you see?")
    return [
        record(f"caption_{scene.name}", scene, [(rng.choice(asks), caption(scene, rng))])
        for scene in scenes
    ]


def record(name: str, scene: Scene, turns: list[tuple[str, str]], kind: str | None = None) -> dict:
    """turns: questions with their answers; the image comes before the first."""
    conversations = []
    for index, (ask, reply) in enumerate(turns):
        ask = f"<image>\n{ask}" if index == 0 else ask
        conversations.append({"from": "human", "value": ask})
        conversations.append({"from": "gpt", "value": reply})
    made = {"id": name, "image": f"{scene.name}.jpg", "conversations": conversations}
    return made | ({"type": kind} if kind else {})


# ---- stage 2: conversation ----


def scene_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """All questions with a short answer about a scene.

    The subject of a question is at its end, so that a small model finds it.
    """
    asked = [question for group in scene.groups for question in _group_questions(group)]
    return asked + _whole_questions(scene, rng)


def _whole_questions(scene: Scene, rng: random.Random) -> list[Question]:
    questions = []
    if len(scene.things) > 1:
        total = NUMBERS[len(scene.things)]
        questions.append(Question("count", "How many shapes?", total, NUMBERS[1:6]))
    if len(scene.things) == len(scene.groups) == 2:
        first, second = rng.sample(scene.things, 2)
        text = f"Where is the {first.shape} from the {second.shape}?"
        questions.append(Question("side", text, side_of(first, second), SIDES))
    return questions


def _group_questions(group: tuple[Thing, ...]) -> list[Question]:
    """About colour, shape, place or count, and size, in this order."""
    thing = group[0]
    name = f"the {thing.shape}" if len(group) == 1 else f"each {thing.shape}"
    if len(group) == 1:
        last = Question("place", f"Where is {name}?", thing.place, PLACES)
    else:
        count = NUMBERS[len(group)]
        last = Question("count", f"How many {plural(thing.shape)}?", count, NUMBERS[1:6])
    return [
        Question("colour", f"What colour is {name}?", thing.colour, tuple(COLOURS)),
        Question("shape", f"Which shape is {thing.colour}?", thing.shape, SHAPES),
        last,
        Question("size", f"How large is {name}?", thing.size, ("small", "large")),
    ]


def existence_question(scene: Scene, rng: random.Random, short: bool = False) -> Question:
    """Whether a shape is there; yes is right as often as no. short: with POPE's request."""
    present = {group[0].shape for group in scene.groups}
    answer = rng.choice(("Yes", "No"))
    shape = rng.choice([x for x in SHAPES if (x in present) == (answer == "Yes")])
    text = is_there(shape) + (SHORT_ANSWER if short else "")
    return Question("existence", text, answer, ("Yes", "No"))


def is_there(shape: str) -> str:
    """As POPE asks."""
    return f"Is there {article(shape)} in the image?"


def _conversation(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Questions that do not give away each other's answers, so that each needs the image.

    So of two groups only one is asked for its colour, or shape, or place: the other's would follow
    by elimination.
    """
    questions = _whole_questions(scene, rng)
    colour, shape, *_ = _group_questions(rng.choice(scene.groups))
    questions.append(rng.choice((colour, shape)))
    questions.append(_group_questions(rng.choice(scene.groups))[2])
    questions.append(_group_questions(rng.choice(scene.groups))[3])
    rng.shuffle(questions)
    return [(question.text, question.answer) for question in questions]


# ---- stage 2: detail ----


def detail(scene: Scene, by_shape: bool = False) -> str:
    """Everything in the image, in a few sentences; by_shape names each thing first."""
    count = len(scene.things)
    there = "There is one shape." if count == 1 else f"There are {NUMBERS[count]} shapes."
    sentences = [there, *(_describe(group, by_shape) for group in scene.groups)]
    if count == 2 and len(scene.groups) == 2:
        first, second = (group[0] for group in scene.groups)
        phrase = _side_phrase(side_of(first, second))
        sentences.append(f"The {first.shape} is {phrase} the {second.shape}.")
    return " ".join(sentences)


def _describe(group: tuple[Thing, ...], by_shape: bool) -> str:
    thing = group[0]
    if by_shape and len(group) == 1:
        return f"The {thing.shape} is {thing.colour}, {thing.size} and {thing.place}."
    if by_shape:
        return f"Each {thing.shape} of {NUMBERS[len(group)]} is {thing.colour} and {thing.size}."
    if len(group) == 1:
        words = f"{thing.size} {thing.colour} {thing.shape}"
        return f"{article(words).capitalize()} is {thing.place}."
    return f"{name_of(group, with_size=True).capitalize()} are in the picture."


# ---- stage 2: reasoning ----


def reasoning(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question that needs a step of reasoning, and its careful answer."""
    group = rng.choice(scene.groups)
    forms = [_doubt_saying, _doubt_saying, _add_one, _cannot_tell]
    if len(group) > 1:
        forms += [_share, _take_all]
    return rng.choice(forms)(group, rng)


def _doubt_saying(group: tuple[Thing, ...], rng: random.Random) -> tuple[str, str]:
    shape, colour = group[0].kind
    said = SAID_COLOUR[shape]
    # yes as often as no: tuning must not teach either word
    verb, word = rng.choice((("agree", "No"), ("disagree", "Yes")))
    ask = f"Some say that every {shape} in the world is {said}. Does this picture {verb}?"
    if colour == said:
        reply = f"It shows {article(colour)} {shape}, but that does not prove it for every {shape}."
    else:
        reply = f"{word}, it shows {article(colour)} {shape}, so the saying is not true."
    return ask, reply


def _add_one(group: tuple[Thing, ...], rng: random.Random) -> tuple[str, str]:
    shape, count = group[0].shape, len(group)
    ask = f"If {rng.choice(NAMES)} draws one more {shape}, how many will there be?"
    now = f"is one {shape}" if count == 1 else f"are {NUMBERS[count]} {plural(shape)}"
    return ask, f"There {now} now, so there will be {NUMBERS[count + 1]}."


def _cannot_tell(group: tuple[Thing, ...], rng: random.Random) -> tuple[str, str]:
    asks = ("Who drew this picture?", "How heavy is the {}?", "What will the {} do tomorrow?")
    ask = rng.choice(asks).format(group[0].shape)
    return ask, "I cannot know that. The picture shows only shapes."


def _share(group: tuple[Thing, ...], rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(NAMES, 2)
    shapes, count = plural(group[0].shape), len(group)
    ask = f"{first} and {second} want to share the {shapes} fairly. How many does each get?"
    rest = " and one is left" if count % 2 else ""
    return ask, f"There are {NUMBERS[count]} {shapes}, so each gets {NUMBERS[count // 2]}{rest}."


def _take_all(group: tuple[Thing, ...], rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(NAMES, 2)
    thing, count = group[0], NUMBERS[len(group)]
    shapes, reply = (
        plural(thing.shape),
        f"there are {count}, and it is fair that {second} gets some.",
    )
    if rng.random() < 0.5:
        return f"May {first} take all the {shapes} and leave none for {second}?", f"No, {reply}"
    return f"Should {first} leave some of the {shapes} for {second}?", f"Yes, {reply}"


def finetune_records(scenes: list[Scene], seed: int) -> list[dict]:
    """Stage 2: per scene one conversation per group and a detail sample; per fourth scene a
    reasoning sample."""
    rng = random.Random(f"instructions {seed}")
    records = []
    for index, scene in enumerate(scenes):
        for part in range(len(scene.groups)):
            turns = _conversation(scene, rng)
            name = f"conversation_{scene.name}_{part}"
            records.append(record(name, scene, turns, "conversation"))
        by_shape = rng.random() < 0.5
        ask = "Describe each shape." if by_shape else "Describe the picture in detail."
        turns = [(ask, detail(scene, by_shape))]
        records.append(record(f"detail_{scene.name}", scene, turns, "detail"))
        if index % 4 == 0:
            turns = [reasoning(scene, rng), reasoning(scene, rng)]
            records.append(record(f"reasoning_{scene.name}", scene, turns, "reasoning"))
    return records


# ---- held-out questions ----


def heldout_records(scenes: list[Scene], seed: int) -> list[dict]:
    """Three questions per scene, a record each, with their choices; "type" is the kind."""
    rng = random.Random(f"questions {seed}")
    records = []
    for scene in scenes:
        questions = scene_questions(scene, rng)
        rng.shuffle(questions)
        questions.sort(key=lambda question: question.kind != "side")  # the rarest kind first
        for question in questions[:3]:
            turns = [(question.text, question.answer)]
            name = f"question_{len(records):04d}"
            asked = record(name, scene, turns, question.kind)
            records.append(asked | {"choices": list(question.choices)})
    return records
