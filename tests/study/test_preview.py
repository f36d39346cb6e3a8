"""The dry run, and the script for SLURM."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from mmalign.errors import UserError
from mmalign.flops import Workload, model_flops
from mmalign.model.config import CLIP_VIT_L_14, LLAMA2_7B
from mmalign.study.cost import MFU, cost_of
from mmalign.study.identity import Orders
from mmalign.study.preview import preview
from mmalign.study.slurm import slurm_script
from mmalign.study.study_file import read_study
from tests.conftest import REPOSITORY

STUDIES = sorted((REPOSITORY / "scripts" / "studies").glob("*.toml"))


def dry_run(path: Path, **overrides) -> str:
    names = {name.replace("__", "."): value for name, value in overrides.items()}
    orders = Orders(read_study(path, names))
    return preview(orders, orders.study.runs, jobs=2, gpu="h100-80g")


def test_states_and_what_is_shared(study_file, finished):
    text = dry_run(study_file())
    assert re.search(r"small +pretrain +2 new, shared by 4 ", text)
    assert re.search(r"small +part +2 new .*finetune.json, 16 samples", text)
    assert "9 runs: 9 new; 2 of stage 1, shared by 4 of stage 2" in text
    text = preview(finished, finished.study.runs, jobs=1, gpu="h100-80g")
    assert "9 runs: 9 done;" in text and "training: 0.0 GPU-hours to do" in text


def test_the_paper_without_weights_and_data(monkeypatch, tmp_path):
    """Every row, stage 1 once per parent and seed, what is missing, what could be found."""
    path = REPOSITORY / "scripts" / "studies" / "paper.toml"
    text = dry_run(path, study__output=str(tmp_path))
    for parent in ("llama2-7b", "llama2-7b-chat", "llama-7b", "vicuna-7b", "open-alpaca-3b"):
        assert re.search(rf"^{parent} +pretrain +3 new, shared by \d+ ", text, re.M)
    assert "18 of stage 1" in text and "missing: Llama-2-7b-hf (llama2-7b/base and" in text
    assert "truth (visual - base) on truthfulqa_mc2: 3.1 / 4.4 / 5.4" in text  # n = 817
    assert re.search(r"training: \d+\.\d GPU-hours", text) and re.search(r"disk: up to \d", text)


def test_published_models_without_weights(tmp_path):
    path = REPOSITORY / "scripts" / "studies" / "published.toml"
    text = dry_run(path, study__output=str(tmp_path))
    assert re.search(r"^mistral-7b-instruct +llava-1-6-mistral +1 new$", text, re.M)
    assert "missing: llava-1.5-7b-hf (vicuna-7b/llava-1-5)" in text
    assert "training: none" in text


def test_flops_of_the_paper_s_row():
    """80k samples of 550 tokens, 242 of them with a target, as the memory plan assumes."""
    study = read_study(REPOSITORY / "scripts" / "studies" / "paper.toml")
    run = next(x for x in study.runs if (x.parent, x.variant) == ("llama2-7b", "visual"))
    cost = cost_of(study, run, None)
    whole = model_flops(Workload(LLAMA2_7B, CLIP_VIT_L_14), [550], 242, 1).total * 80_000
    assert cost.flops == pytest.approx(whole, rel=0.02)  # the shortcuts save 1.4%
    assert cost.hours("h100-80g") == pytest.approx(cost.flops / (MFU * 989.4e12) / 3600)
    with pytest.raises(UserError, match="--gpu a40: expected one of"):  # its rate is unpublished
        cost.hours("a40")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_line_of_our_studies_is_read(path):
    assert read_study(path).runs


def test_slurm_submits_one_task_per_run_stage_by_stage(study_file, tmp_path):
    """With an sbatch that writes down what it is given."""
    orders = Orders(read_study(study_file()))
    script = slurm_script(orders, orders.study.runs, ["study.toml", "--study.keep", "scores"])
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        '#!/bin/bash\necho "$@" >> calls\n[ "$1" = --parsable ] && cat >> calls\n'
        "echo $((41 + $(grep -c parsable calls)))\n"
    )
    sbatch.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env={"PATH": path}, check=True)
    calls = (tmp_path / "calls").read_text()
    first, second, report = re.split(r"^--parsable|^--job-name", calls, flags=re.M)[1:]
    assert "--array=0-4" in first and "dependency" not in first
    assert "runs=(small/base small/pretrain/seed_0 small/text-only/seed_0 small/pre" in first
    assert "--array=0-3" in second and "--dependency=afterany:42" in second
    assert 'study.toml --study.keep scores --only "${runs[SLURM_ARRAY_TASK_ID]}"' in second
    assert "--dependency=afterany:43" in report and "--report" in report
