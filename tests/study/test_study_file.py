"""Study files: what runs they ask for, and what is said about mistakes."""

import pytest

from mmalign.errors import UserError
from mmalign.study.study_file import parse_overrides, read_study
from tests.study.conftest import STUDY


def test_runs_are_parents_by_variants_by_seeds(study_file):
    runs = read_study(study_file()).runs
    assert [run.name for run in runs] == [
        "small/base",
        *(f"small/{x}/seed_0" for x in ("pretrain", "visual", "text-only", "part")),
        *(f"small/{x}/seed_1" for x in ("pretrain", "visual", "text-only", "part")),
    ]


def test_stage_1_is_shared_by_the_variants_that_see_pictures(study_file):
    study = read_study(study_file())
    pretrain = study.runs[1]
    assert [run.name for run in study.dependants(pretrain)] == [
        "small/visual/seed_0",
        "small/part/seed_0",
    ]


def test_settings_of_stage_parent_and_variant_in_this_order(study_file):
    """Over the recipe; every variant of a seed has this seed."""
    more = "[parents.other]\nfinetune.global-batch-size = 4\n[variants.own]\n"
    more += 'finetune = "tiny-finetune-text-only"\nglobal-batch-size = 2\nparents = ["other"]\n'
    configs = {run.name: run.config for run in read_study(study_file(more=more)).runs if run.config}
    found = {name: config.global_batch_size for name, config in configs.items()}
    assert found["small/pretrain/seed_1"] == 32  # the recipe's
    assert found["small/visual/seed_1"] == 8
    assert found["other/visual/seed_1"] == 4
    assert found["other/own/seed_1"] == 2
    assert "small/own/seed_1" not in found
    assert all(config.seed == int(name[-1]) for name, config in configs.items())


def test_overrides_of_the_command_line(study_file):
    given = "--study.seeds [7] --finetune.optimizer.learning-rate=0.5 --parents.small.decoder /a/b"
    study = read_study(study_file(), parse_overrides(given.split()))
    config = next(run.config for run in study.runs if run.variant == "visual")
    assert study.settings.seeds == (7,)
    assert config.optimizer.learning_rate == 0.5 and config.model.decoder == "/a/b"


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("num-steps = 3", "num-step = 3", r"\[pretrain\]: there is no setting 'num-step'; did"),
        ("num-steps = 3", 'num-steps = "3"', r"num-steps is '3'; expected an integer"),
        (
            '["truthfulqa"]',
            '"truthfulqa"',
            r"tasks is 'truthfulqa'; expected a list, each item a string, such as \['truthfulqa'\]",
        ),
        ("num-steps = 3", "num-steps = 0", "--num-steps is 0, expected"),
        ('"plain"', '"plane"', "plane"),
        ("seeds = [0, 1]", "seeds = [1, 1]", r"seeds are \(1, 1\); expected distinct"),
        ("seeds = [0, 1]", "sneeds = [0, 1]", "there is no setting 'sneeds'; did you mean 'seeds'"),
        ('["truthfulqa"]', '["truth"]', "unknown task 'truth'"),
        ("[variants.part]", "[variants.base]", r"\[variants.base\]: expected a name"),
        ('pretrain = "tiny-pretrain"', 'pretrain = "tiny-finetune"', "pretrain is 'tiny-finetune'"),
        ("visual - base", "visual - vase", "question 'Q1': the study has no variant 'vase'"),
        (
            '["truthfulqa_mc2"]',
            '["truthfulqa_mc3"]',
            "no metric 'truthfulqa_mc3'.*; did you mean tr",
        ),
        ('["truthfulqa_mc2"]', '["ethics_mean"]', "no metric 'ethics_mean' of the study's tasks"),
        ("visual - base", "visual + base", "it has none of the known forms"),
        (
            "samples = 16",
            'control = "mirror"',
            "control is 'mirror'; expected one of shuffle-images",
        ),
        ("samples = 16", 'control = "length-matched"', "control-data is missing: it is needed by"),
        ("samples = 16", 'model = "folder"', "finetune is for training, but model is scored"),
        ("samples = 16", "lora.alpha = 3", r"\[variants.part\]: lora.alpha would have no effect"),
        ("[study]", '[study]\ncorruptions = ["fog"]', "corruptions has no effect without a task"),
        ("visual-questions = ", "#", "images has no effect without visual-questions. Leave it out"),
        ("samples = 16", 'stage = "pretrain"', "stage is not for a study's runs. Leave it out"),
        (
            "num-steps = 3",
            "num-steps = 3\nnum_steps = 4",
            "num_steps stands there twice",
        ),
        ("[study]", '[study]\nname = "../x"', "name is '../x'; expected one without a /"),
        ("[study]", '[study]\nruns = "a\\u0000b"', "runs is .*, which holds a NUL character"),
        ('pretrain = "tiny-pretrain"', "", r"\[pretrain\] has no effect: no parent has pretrain"),
        ("[finetune]", "[finetune]\nnum-epochs = 2", r"\[finetune\]: num-epochs would have no"),
        ("[pretrain]", "[pretraining]", r"unknown table \[pretraining\]"),
        ("[pretrain]", "[pretrain", "study.toml: "),
        ("samples = 16", "seed = 5", r"\[variants.part\]: seed is given by \[study\]"),
        ("samples = 16", 'run-dir = "x"', r"\[variants.part\]: run-dir is given by \[study\]"),
        ("visual - base", "(visual - base) of big vs small", "'Q1': unknown parent 'big'"),
        ("primary = true", 'primary = "no"', "primary is 'no'; expected true or false"),
        ("primary = true", "margin = 1.0", "margin is for a contrast with ~"),
        ("primary = true", "amounts = [1, 2]", "amounts are for a slope"),
        ('name = "Q2"', 'name = "Q1"', r"questions are called \['Q1', 'Q1'.*; expected a name"),
        ('name = "Q2"', "", r"questions are called \['Q1', ''.*; expected a name"),
    ],
)
def test_mistakes_are_named(study_file, old, new, said):
    assert old in STUDY
    with pytest.raises(UserError, match=said):
        read_study(study_file(STUDY.replace(old, new, 1)))


def test_unknown_arguments_are_named(study_file):
    with pytest.raises(UserError, match="unknown argument '--dry'"):
        parse_overrides(["--dry"])
    with pytest.raises(UserError, match="no parents 'big'; it has small"):
        read_study(study_file(), {"parents.big.decoder": "x"})
    for name, said in (
        ("variants.part", r"variants is .*; expected tables \[variants.NAME\]"),
        ("study.seeds.x", "seeds is not a table"),
    ):
        with pytest.raises(UserError, match=said):
            read_study(study_file(), {name: "x"})
    for name in ("pretrain", "questions", "variants"):
        path = study_file(f"{name} = 3\n")
        with pytest.raises(UserError, match=rf"study.toml: {name} is '3'; expected tables \["):
            read_study(path)


def test_choice_of_runs(study_file):
    study = read_study(study_file())
    chosen = study.chosen(["base", "small/vis*"], [1])
    assert [run.name for run in chosen] == ["small/base", "small/visual/seed_1"]
    with pytest.raises(UserError, match="--only pictures"):
        study.chosen(["pictures"], [])
    with pytest.raises(UserError, match="--seeds 5: the study's seeds are 0, 1"):
        study.chosen([], [5])
