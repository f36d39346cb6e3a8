"""How an image becomes pixels, read from and written to preprocessor_config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmalign.files import Settings, read_json

PIL_BICUBIC = 3  # PIL.Image.Resampling
_CLIP_PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes pixels; names and meaning are those of preprocessor_config.json.

    The defaults are those of every OpenAI CLIP, whatever its size.
    """

    size: int  # of the short side after resizing
    crop_size: int  # side of the square cut out of the centre
    resample: Literal["bicubic"] = "bicubic"
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_hf(cls, folder: str | Path, image_size: int) -> "Preprocessing":
        """Reads preprocessor_config.json, or image_processor of transformers 5's processor_config.

        Without either the defaults. Raises UserError for anything but the steps of
        CLIPImageProcessor (convert, resize the short side, crop the centre, rescale, normalise)
        that end in image_size.
        """
        hf = _read_preprocessor(Path(folder))
        if hf is None:
            return cls(size=image_size, crop_size=image_size)
        for key in ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if not hf.flag(key, True):
                raise hf.error(key, "true, as every CLIP has it")
        for key in ("image_processor_type", "feature_extractor_type"):
            hf.require(key, None, *_CLIP_PROCESSORS)
        hf.require("resample", None, PIL_BICUBIC)
        hf.number("rescale_factor", 0.999 / 255, 1.001 / 255, 1 / 255)
        crop_size = _square(hf, "crop_size", ("height", "width"), image_size)
        if crop_size != image_size:
            raise hf.error("crop_size", f"image_size of the vision tower, {image_size}")
        size = _square(hf, "size", ("shortest_edge",), image_size)
        if size < crop_size:
            raise hf.error("size", f"at least crop_size, {crop_size}")
        mean = _channels(hf, "image_mean", cls.image_mean, -10)
        return cls(
            size, crop_size, "bicubic", mean, _channels(hf, "image_std", cls.image_std, 1e-4)
        )

    def to_hf(self) -> dict:
        """preprocessor_config.json, as CLIPImageProcessor reads it."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": {"bicubic": PIL_BICUBIC}[self.resample],
            "do_center_crop": True,
            "crop_size": {"height": self.crop_size, "width": self.crop_size},
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
