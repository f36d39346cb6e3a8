"""How an image becomes pixels, read from and written to preprocessor_config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmalign.files import Settings, read_json

PIL_BICUBIC = 3  # PIL.Image.Resampling
_PADDING = ("LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil")
TILING = ("LlavaNextImageProcessor", "LlavaNextImageProcessorFast", "LlavaNextImageProcessorPil")
_PROCESSORS = {  # by whether the tower is a CLIP, else it is a SigLIP
    True: (
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPImageProcessorPil",
        "CLIPFeatureExtractor",
    ),
    False: ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"),
}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes pixels; names and meaning are those of preprocessor_config.json.

    The defaults are those of every OpenAI CLIP, whatever its size.
    """

    size: int  # of the short side after resizing; without do_center_crop of both
    crop_size: int  # side of the square cut out of the centre
    resample: Literal["bicubic"] = "bicubic"
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    do_center_crop: bool = True  # False: SigLIP, which stretches the image to a square
    do_pad: bool = False  # LLaVA 1.5: to a square first, with the mean's colour

    @classmethod
    def stock(cls, image_size: int, is_clip: bool) -> "Preprocessing":
        """Of OpenAI's CLIPs and of Google's SigLIPs."""
        if is_clip:
            return cls(size=image_size, crop_size=image_size)
        half = (0.5, 0.5, 0.5)
        return cls(image_size, image_size, "bicubic", half, half, do_center_crop=False)

    @classmethod
    def from_hf(cls, folder: str | Path, image_size: int, is_clip: bool = True) -> "Preprocessing":
        """Reads preprocessor_config.json, or image_processor of transformers 5's processor_config.

        Without either the stock one. Raises UserError for anything but the steps of
        CLIPImageProcessor (convert, resize the short side, crop the centre, rescale, normalise) or
        SiglipImageProcessor (resize to a square instead) that end in image_size.
        """
        hf, stock = _read_preprocessor(Path(folder)), cls.stock(image_size, is_clip)
        if hf is None:
            return stock
        for key in ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"):
            if not hf.flag(key, True):
                raise hf.error(key, "true, as every vision tower has it")
        for key in ("image_processor_type", "feature_extractor_type"):
            hf.require(key, None, *_PROCESSORS[is_clip], *_PADDING, *TILING)
        hf.require("resample", None, PIL_BICUBIC)
        hf.number("rescale_factor", 0.999 / 255, 1.001 / 255, 1 / 255)
        sides, crops = ("height", "width"), hf.flag("do_center_crop", is_clip)
        if crops:
            crop_size = _square(hf, "crop_size", sides, image_size)
            size = _square(hf, "size", ("shortest_edge",), image_size)
        else:
            crop_size = size = _square(hf, "size", sides, image_size)
        if crop_size != image_size:
            key = "crop_size" if crops else "size"
            raise hf.error(key, f"image_size of the vision tower, {image_size}")
        if size < crop_size:
            raise hf.error("size", f"at least crop_size, {crop_size}")
        mean = _channels(hf, "image_mean", stock.image_mean, -10)
        std = _channels(hf, "image_std", stock.image_std, 1e-4)
        pads = hf.flag("do_pad", False)
        return cls(size, crop_size, "bicubic", mean, std, do_center_crop=crops, do_pad=pads)

    @property
    def background(self) -> tuple[int, int, int]:
        """The levels that do_pad fills with, rounded down as LLaVA does it."""
        red, green, blue = (int(255 * x) for x in self.image_mean)
        return red, green, blue

    def to_hf(self, is_clip: bool) -> dict:
        """preprocessor_config.json, as the processor that it names reads it."""
        square = {"height": self.crop_size, "width": self.crop_size}
        sizes = {"size": {"shortest_edge": self.size}, "crop_size": square}
        return {
            "image_processor_type": (_PADDING if self.do_pad else _PROCESSORS[is_clip])[0],
            **({"do_pad": True} if self.do_pad else {}),
            "do_convert_rgb": True,
            "do_resize": True,
            "resample": {"bicubic": PIL_BICUBIC}[self.resample],
            "do_center_crop": self.do_center_crop,
            **(sizes if self.do_center_crop else {"size": square}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }


def _read_preprocessor(folder: Path) -> Settings | None:
    path = folder / "preprocessor_config.json"
    if path.exists():
        return Settings(read_json(path), path)
    path = folder / "processor_config.json"
    if not path.exists():
        return None
    settings = Settings(read_json(path), path)
    return settings.section("image_processor") if "image_processor" in settings else None


def _square(hf: Settings, key: str, sides: tuple[str, ...], default: int) -> int:
    """A number, or an object with these sides alone, all of them equal."""
    value = hf.get(key)
    if not isinstance(value, dict):
        return hf.integer(key, 1, 2**14, default, null=True)
    lengths = [hf.section(key).integer(side, 1, 2**14, 0) for side in sides if side in value]
    others = [side for side in value if side not in sides and value[side] is not None]
    if len(lengths) != len(sides) or len(set(lengths)) != 1 or others:
        raise hf.error(key, f"one number for {' and '.join(sides)}")
    return lengths[0]


def _channels(
    hf: Settings, key: str, default: tuple[float, ...], low: float
) -> tuple[float, float, float]:
    value = hf.values.get(key, default)
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise hf.error(key, "three numbers, for red, green and blue")
    channels = Settings({str(i): x for i, x in enumerate(value)}, hf.path, f"{hf.within}{key}.")
    red, green, blue = (channels.number(i, low, 10, 0) for i in channels.values)
    return red, green, blue
