"""What a run is made from, by content: its identity, its folder, and how far it has come.

Two runs with the same identity end with the same weights. It counts the settings that differ from
their defaults and change the result (an option that is new has its default), the content of data,
weights and tokenizer, the transform of the data, and stage 1's own identity. Images are compared by
the run itself (training/inputs.py).
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from mmalign.config import TrainConfig
from mmalign.data.mix import data_files, has_tables
from mmalign.data.pictures import split_root
from mmalign.errors import UserError
from mmalign.evaluation.pictures import Control
from mmalign.evaluation.tasks import describe_data, picture_tasks, resolve_tasks
from mmalign.files import read_json, write_json
from mmalign.ownership import is_owned
from mmalign.study.contrasts import BASE
from mmalign.study.plan import PRETRAIN, Run, Settings, Study
from mmalign.tokenizer import Tokenizer
from mmalign.toy_world import toy_world, toy_world_folder
from mmalign.training.build import TOY_WORLD, resolve
from mmalign.training.inputs import Files, digest, fingerprint, of_folder
from mmalign.training.run_folder import FREE_FIELDS, flatten

_EVALUATION = "the evaluation"


@dataclass(frozen=True)
class Evaluation:
    """What every model is asked."""

    tasks: tuple[str, ...]
    controls: tuple[Control, ...]  # of those about pictures, as corruptions
    corruptions: tuple[str, ...]
    data_root: str
    limit: int | None
    visual_questions: str
    visual_questions_images: str
    forgetting: tuple[str, ...]
    key: str = ""  # changes with any of it; empty: files are missing


@dataclass(frozen=True)
class Order:
    """A run with all paths filled in: what its process needs to know."""

    run: Run
    folder: Path  # of which the name ends with the first digits of `identity`
    identity: str = ""  # empty: an input is missing
    evaluation: Evaluation | None = None  # None: stage 1
    config: TrainConfig | None = None  # None: base
    second: str = ""  # the second file of the transform
    pretrain: Path | None = None  # stage 1's folder

    @property
    def train_dir(self) -> Path:
        return self.folder / "train"

    @property
    def projector(self) -> Path:
        return self.train_dir / "export" / "projector.safetensors"

    @property
    def scores(self) -> Path:
        """The output of its evaluation."""
        return self.folder / "scores"

    @property
    def pictures(self) -> Path:
        """The same of tasks about pictures; absent where the model sees none."""
        return self.folder / "pictures"

    def outcome(self) -> dict:
        """outcome.json: how its last process ended; {} where it did not, or was killed."""
        path = self.folder / "outcome.json"
        try:
            return read_json(path) if path.exists() else {}
        except UserError:
            return {}

    def is_done(self) -> bool:
        """Whether what it is for is there: scores, or stage 1's projector."""
        outcome = self.outcome()
        if outcome.get("outcome") != "done":
            return False
        if self.evaluation is None:
            return self.projector.exists()
        return outcome.get("evaluation") == self.evaluation.key

    def state(self) -> str:
        """new, running, stopped, failed or done."""
        if not self.identity or not self.folder.is_dir():
            return "new"
        if is_owned(self.folder):
            return "running"
        if self.is_done():
            return "done"
        return "failed" if self.outcome().get("outcome") == "failed" else "stopped"


class Contents:
    """sha256 of files and model folders, remembered by path, size and time of change."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.known = read_json(path) if path.exists() else {}
        except UserError:  # damaged: everything is read again
            self.known = {}
        self.found: dict[str, dict] = {}

    def of(self, location: str | Path) -> str:
        """Of a file, or of the settings and weights of a Hugging Face folder."""
        path = Path(location).resolve()
        return self._of(path, of_folder(path) if path.is_dir() else [("", path)])

    def of_data(self, location: str | Path) -> str:
        """Of a data file or folder."""
        path = Path(location).resolve()
        return self._of(path, data_files(path))

    def _of(self, path: Path, files: Files) -> str:
        name = str(path)
        if name not in self.found:
            self.found[name] = fingerprint(list(files), self.known.get(name, {}))
        return self.found[name]["sha256"]

    def save(self) -> None:
        if self.known | self.found != self.known:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.known | self.found)


class Orders:
    """The order of each of a study's runs, and what is missing: path -> names of its runs."""

    def __init__(self, study: Study, dry: bool = False):
        """dry: does not make the toy world, which is missing until a run makes it."""
        self.study, self.missing = study, {}
        self._lacks_toy_world = dry and not toy_world_folder().is_dir()
        self._contents = Contents(study.runs_folder / "contents.json")
        self.evaluation = self._evaluation(study.settings)
        self._by_run: dict[str, Order] = {}
        for run in study.runs:
            self._by_run[run.name] = self._order(run)
        self._contents.save()

    def __getitem__(self, run: Run) -> Order:
        return self._by_run[run.name]

    def problem(self, run: Run) -> str:
        """What is missing for a run; empty where it can start."""
        names = {run.name, *([run.pretrain.name] if run.pretrain else ())}
        if run.is_evaluated:
            names.add(_EVALUATION)
        paths = [path for path, needed_by in self.missing.items() if names & set(needed_by)]
        return f"missing: {', '.join(paths)}" if paths else ""

    def needed(self, run: Run) -> bool:
        """Whether a dependant of this stage 1 is still to be trained."""
        return any(self[x].state() != "done" for x in self.study.dependants(run))

    def state(self, run: Run) -> str:
        """As Order.state; a stage 1 whose projector is deleted is new while somebody needs it."""
        order = self[run]
        state = order.state()
        if run.variant == PRETRAIN and state == "stopped" and "seconds" in order.outcome():
            return "new" if self.needed(run) else "done"
        return state

    def _evaluation(self, settings: Settings) -> Evaluation:
        root, questions = settings.evaluation_data, settings.visual_questions
        images = settings.visual_questions_images
        if root == TOY_WORLD and not self._lacks_toy_world:
            root = str(toy_world().evaluation)
        if questions == TOY_WORLD and not self._lacks_toy_world:
            questions, images = str(toy_world().heldout_json), str(toy_world().image_root)
        asked = Evaluation(
            *(settings.tasks, settings.controls, settings.corruptions, root, settings.limit),
            *(questions, images, settings.forgetting),
        )
        try:
            files = describe_data(resolve_tasks(settings.tasks), root)
            contents = [self._contents.of(questions)] if questions else []
        except (UserError, OSError):
            self.missing[root or "study.evaluation-data"] = [_EVALUATION]
            return asked
        facts: list = [settings.tasks, settings.limit, settings.forgetting, files, contents]
        if picture_tasks(settings.tasks):
            facts += [settings.controls, settings.corruptions]
        return replace(asked, key=digest(facts))

    def _order(self, run: Run) -> Order:
        evaluation = None if run.variant == PRETRAIN else self.evaluation
        missing = self._missing_of(run)
        for path in missing:
            self.missing.setdefault(path, []).append(run.name)
        pretrain = self[run.pretrain] if run.pretrain else None
        if missing or (pretrain and not pretrain.identity):
            return Order(run, self.study.runs_folder / run.name, evaluation=evaluation)
        config = resolve(run.config) if run.config else None
        second = run.transform.second if run.transform else ""
        decoder = str(toy_world().decoder) if run.decoder == TOY_WORLD else run.decoder
        run = replace(run, decoder=decoder)
        identity = self._identity(run, config, second, pretrain)
        folder = self.study.runs_folder / f"{run.name}-{identity[:8]}"
        if config:
            config = replace(config, run_dir=folder / "train")
            if pretrain:
                projector = replace(config.model, projector=str(pretrain.train_dir))
                config = replace(config, model=projector)
        source = pretrain.folder if pretrain else None
        return Order(run, folder, identity, evaluation, config, second, source)

    def _identity(
        self, run: Run, config: TrainConfig | None, second: str, pretrain: Order | None
    ) -> str:
        of = self._contents.of
        if config is None:
            return digest([BASE, of(run.decoder), _tokenizer(run.decoder)])
        now, default = (_flat(x) for x in (config, TrainConfig(stage=config.stage)))
        settings = {
            name: value
            for name, value in now.items()
            if name not in FREE_FIELDS
            and not name.startswith("evaluation.")
            and (value != default[name] or name == "stage")
        }
        inputs = [of(config.model.decoder), _tokenizer(config.model.tokenizer)]
        inputs.append(self._contents.of_data(config.data.path))
        if not config.data.text_only:
            inputs.append(of(config.model.vision_tower))
            inputs.append(of(config.model.projector) if config.model.projector else "")
        transform = [asdict(run.transform), of(second) if second else ""] if run.transform else []
        return digest([settings, inputs, transform, pretrain.identity if pretrain else ""])

    def _is_there(self, path: str) -> bool:
        if _is_toy(path):
            return not self._lacks_toy_world
        return bool(path) and Path(path).exists()

    def _missing_of(self, run: Run) -> list[str]:
        """Paths that do not exist; the setting's name where there is none."""
        config, name = run.config, f"parents.{run.parent}"
        of_parent = run.variant == BASE or config
        wanted = {f"{name}.decoder" if of_parent else f"variants.{run.variant}.model": run.decoder}
        roots = ()
        if config:
            stage = config.stage
            wanted |= {f"{stage}.data.path": config.data.path}
            if not config.data.text_only:
                wanted |= {f"{name}.vision-tower": config.model.vision_tower}
                roots = [split_root(root)[1] for root in config.data.image_roots]
                if roots or not has_tables(Path(config.data.path)):
                    wanted |= {f"{stage}.data.image-root": roots[0] if roots else ""}
        if run.transform and run.transform.second:
            wanted["control-data"] = run.transform.second
        needed = [*wanted.items(), *(("", root) for root in roots[1:])]
        missing = (path or setting for setting, path in needed if not self._is_there(path))
        return list(dict.fromkeys(x.partition("/")[0] if _is_toy(x) else x for x in missing))


def _is_toy(path: str) -> bool:
    return path.partition("/")[0] == TOY_WORLD


@lru_cache
def _tokenizer(folder: str) -> str:
    return Tokenizer.from_pretrained(folder).fingerprint


def _flat(config: TrainConfig) -> dict:
    return flatten(json.loads(json.dumps(asdict(config), default=str)))
