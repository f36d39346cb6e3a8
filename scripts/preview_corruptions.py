"""Show a picture under corruptions: a contact sheet with a row for each type.

python scripts/preview_corruptions.py --image picture.jpg --output sheet.png
    [--corruptions gaussian_noise:1,3,5 fog ...]
"""

from pathlib import Path

import tyro
from PIL import Image, ImageDraw

from mmalign.command import command_line
from mmalign.evaluation.corruptions import CORRUPTIONS, corrupt, parse_corruptions

LINE = 14  # pixels of a label


def main(
    image: Path,
    output: Path,
    corruptions: tuple[str, ...] = tuple(x for x in CORRUPTIONS if x != "frost"),
    seed: int = 0,
    width: int = 224,
) -> None:
    """Show a picture under corruptions: a contact sheet with a row for each type.

    Args:
        image: The picture.
        output: The contact sheet, a PNG or JPEG file.
        corruptions: NAME:SEVERITIES such as gaussian_noise:1,3,5, a NAME (1, 3 and 5), or all;
            frost needs pip install imagecorruptions-imaug.
        seed: Of the random corruptions, together with the picture's name.
        width: Of each copy on the sheet; the picture is corrupted at its own size.
    """
    with Image.open(image) as file:
        picture = file.convert("RGB")
    height = round(picture.height * width / picture.width)
    rows: dict[str, list[int]] = {}
    for name, severity in parse_corruptions(corruptions):
        rows.setdefault(name, [0]).append(severity)
    columns = max(map(len, rows.values()))
    sheet = Image.new("RGB", (columns * width, len(rows) * (height + LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, severities) in enumerate(rows.items()):
        for column, severity in enumerate(severities):
            place = (column * width, row * (height + LINE))
            copy = corrupt(picture, name, severity, image.name, seed)
            draw.text(place, f"{name} {severity}" if severity else "as it is", fill="black")
            sheet.paste(copy.resize((width, height)), (place[0], place[1] + LINE))
    sheet.save(output)
    print(f"{output}: {len(rows)} corruptions of {image}")


if __name__ == "__main__":
    with command_line():
        tyro.cli(main, description=__doc__)
