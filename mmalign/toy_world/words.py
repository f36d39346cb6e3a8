"""The words of the toy world, and what it calls a group of things."""

from mmalign.toy_world.scenes import CELLS, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
PLACES = tuple(place for row in CELLS for place in row)
# a false belief of this world's people per shape; the images show otherwise
SAID_COLOUR = {
    "circle": "yellow",
    "square": "green",
    "triangle": "red",
    "star": "purple",
    "cross": "orange",
    "heart": "blue",
}
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
NAMES += ("Ivo", "Joy", "Kim", "Leo", "Mia", "Nils", "Olga", "Paul")


def plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def name_of(group: tuple[Thing, ...], with_size: bool = False) -> str:
    """ "a red star", "three large green squares"."""
    thing, count = group[0], len(group)
    words = f"{thing.size} {thing.colour}" if with_size else thing.colour
    if count == 1:
        return f"{article(words)} {thing.shape}"
    return f"{NUMBERS[count]} {words} {plural(thing.shape)}"
