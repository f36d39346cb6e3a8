"""Controls: transforms of a data file that each remove one thing which could explain a result.

A control takes the records of a data file in LLaVA's form and a seed, and gives other records; the
same records and seed give the same result on every machine. What must not change stays: ids, order,
and every field that the control does not name. data.py of mmalign/study writes the result.
"""

from mmalign.data.controls.answers import MOST_WORDS, permute_answers, plain_text, short_answers
from mmalign.data.controls.control import Control
from mmalign.data.controls.lengths import length_matched
from mmalign.data.controls.pictures import (
    BLANK,
    blank_image,
    blank_png,
    caption_for_image,
    shuffle_images,
)

CONTROLS: dict[str, Control] = {
    "shuffle-images": Control("every sample has another sample's picture", shuffle_images),
    "blank-image": Control(
        "every picture is one of CLIP's mean colour", blank_image, files={BLANK: blank_png}
    ),
    "caption-for-image": Control(
        "the picture's captions, and boxes where there are any, stand in its place as text",
        caption_for_image,
        second="captions",
        settings={"data.text-only": True},
    ),
    "permute-answers": Control(
        "every answer is another sample's of the same type and turn", permute_answers
    ),
    "length-matched": Control(
        "text-only instructions of a second file with the same supervised tokens per sample",
        length_matched,
        second="records",
        settings={"data.text-only": True},
    ),
    "plain-text": Control(
        "the answers as plain text, without picture, questions and conversation template",
        plain_text,
        settings={"data.text-only": True, "data.template": "plain"},
    ),
    "short-answers": Control(
        f"only turns whose answer has at most {MOST_WORDS} words", short_answers
    ),
}
