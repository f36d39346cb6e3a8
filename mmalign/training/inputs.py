"""inputs.json of a run folder: what the run is made from, by content, and its number of steps.

Every start compares the inputs with those of the first one, wherever they lie now. A file is read
whole (sha256, in threads: about as long as loading it), but only if its path, size or time of
change differ from when it was last read.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from mmalign.config import EvaluationConfig, TrainConfig
from mmalign.data.check import CheckReport
from mmalign.data.dataset import ConversationDataset
from mmalign.data.mix import data_files
from mmalign.errors import UserError
from mmalign.evaluation.tasks import describe_data, resolve_tasks
from mmalign.files import read_json, sha256, write_json
from mmalign.tokenizer import Tokenizer
from mmalign.training.run_folder import FREE_FIELDS, flatten

log = logging.getLogger("mmalign")
Files = Iterable[tuple[str, Path]]  # name that counts as content, and where it lies now
_WEIGHTS = ("*.safetensors", "*.bin")  # the second only where there is none of the first
_ARCHIVES, _TABLES = "archives of images", "tables of images"
_SETTINGS = ("config.json", "preprocessor_config.json", "*.index.json")


class RunInputs:
    """Used by the main process."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.path = run_dir, run_dir / "inputs.json"
        self.known = _read(self.path)
        self.found: dict[str, dict] = dict(self.known.get("inputs", {}))

    def check(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        """Raises UserError that names an input whose content is not that of the first start."""
        model, data = config.model, config.data
        self._compare("tokenizer", model.tokenizer, {"sha256": tokenizer.fingerprint})
        self._compare_files("data file", data.path, data_files(Path(data.path)))
        self._compare_files("decoder", model.decoder, of_folder(Path(model.decoder)))
        if not data.text_only:
            tower = of_folder(Path(model.vision_tower))
            self._compare_files("vision tower", model.vision_tower, tower)
            projector = _of_projector(Path(model.projector)) if model.projector else ()
            self._compare_files("projector", model.projector or "(none)", projector)

    def check_evaluation(self, settings: EvaluationConfig) -> None:
        """As check, for the documents that are scored during training."""
        if settings.every:
            files = describe_data(resolve_tasks(settings.tasks), settings.data_root)
            name = f"evaluation data of {' '.join(settings.tasks)}"
            self._compare(name, settings.data_root, {"sha256": digest(files)})

    def check_images(self, dataset: ConversationDataset, report: CheckReport) -> None:
        """As check, for the images of the samples that the data check keeps.

        Sizes stand for contents unless --data.check-images asks to read all of them. Of an archive
        the directory does: names, sizes, and checksums (zip) or times (tar).
        """
        if dataset.vision is None:
            return
        assert dataset.pictures is not None
        roots, files = " ".join(dataset.data.image_roots), []
        if dataset.pictures.has_folders:
            shown, samples = report.kept[report.num_images > 0], dataset.samples
            names = {image for index in shown for image in samples[int(index)].images}
            found = [(name, dataset.pictures.find(name, name)) for name in sorted(names)]
            files = [(name, picture) for name, picture in found if isinstance(picture, Path)]
        if dataset.data.check_images is True:
            self._compare_files("images", roots, files)
        else:
            sizes = [(name, path.stat().st_size) for name, path in files]
            self._compare("sizes of the images", roots, {"sha256": digest(sizes)})
        if dataset.pictures.table_files or _TABLES in self.found:
            self._compare_files(_TABLES, roots, dataset.pictures.table_files)
        archives = [archive.fingerprint for archive in dataset.pictures.archives]
        if archives or _ARCHIVES in self.found:
            self._compare(_ARCHIVES, roots, {"sha256": digest(archives)})

    def settle(self, config: TrainConfig, num_steps: int) -> str:
        """Fixes the number of steps, writes the file, and returns the run's identity.

        The identity says what is trained: the settings that cannot change, the inputs and
        num_steps, not where they lie.
        """
        before = self.known.get("num_steps", num_steps)
        if before != num_steps:
            raise UserError(
                f"{self.run_dir} was started with {before} steps, now the samples make {num_steps}."
                " Restore the samples and images that the run began with, or use another --run-dir."
            )
        settings = flatten(json.loads(json.dumps(asdict(config), default=str)))
        fixed = {
            name: value
            for name, value in settings.items()
            if name not in FREE_FIELDS and not name.startswith("evaluation.")
        }
        contents = {name: entry["sha256"] for name, entry in self.found.items()}
        run = self.known.get("run") or digest([fixed, contents, num_steps])
        record = {"run": run, "num_steps": num_steps, "inputs": self.found}
        if record != self.known:
            write_json(self.path, record)
        return run

    def _compare_files(self, name: str, location: str | Path, files: Files) -> None:
        self._compare(name, location, fingerprint(list(files), self.found.get(name, {})))

    def _compare(self, name: str, location: str | Path, found: dict) -> None:
        before = self.known.get("inputs", {}).get(name, found)
        if before["sha256"] != found["sha256"]:
            raise UserError(
                f"the {name} {location} has changed since {self.run_dir} was started (sha256 "
                f"{found['sha256'][:8]}, it was {before['sha256'][:8]}). A run continues with what "
                "it began with: restore that, or use another --run-dir."
            )
        self.found[name] = found


def fingerprint(files: list[tuple[str, Path]], before: dict) -> dict:
    """{"sha256": of the names and contents, "stat": of what tells that nothing was written}."""
    stats = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in _stats(files)]
    stat = digest(stats)
    if before.get("stat") == stat:
        return before
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        contents = list(pool.map(lambda file: (file[0], sha256(file[1])), files))
    return {"sha256": digest(contents), "stat": stat}


def _stats(files: Files) -> Iterator[tuple[Path, os.stat_result]]:
    for _, path in files:
        try:
            yield path, path.stat()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error


def of_folder(folder: Path) -> Files:
    """The settings and weights of a Hugging Face folder."""
    weights = next((found for x in _WEIGHTS if (found := sorted(folder.glob(x)))), [])
    settings = (path for x in _SETTINGS for path in folder.glob(x))
    paths = sorted(path for path in (*weights, *settings) if path.is_file())
    return [(path.name, path) for path in paths]


def _of_projector(path: Path) -> Files:
    """The file that load_projector reads, whatever its name; a LLaVA folder as a whole."""
    names = ("export/projector.safetensors", "projector.safetensors", "mm_projector.bin")
    candidates = [path / name for name in names] if path.is_dir() else [path]
    file = next((file for file in candidates if file.exists()), None)
    return [("", file)] if file else of_folder(path)


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict:
    """What the file says; nothing where it is missing or damaged."""
    if not path.exists():
        return {}
    try:
        known = read_json(path)
        whole = all(isinstance(entry["sha256"], str) for entry in known["inputs"].values())
        if not whole or not isinstance(known["run"], str) or type(known["num_steps"]) is not int:
            raise TypeError
    except (UserError, KeyError, TypeError, AttributeError):
        log.warning(
            "%s is damaged, so it is written again from the inputs as they are now; checkpoints of "
            "other inputs are not used",
            path,
        )
        return {}
    return known
