"""scripts/train.sbatch, with srun and scontrol replaced by a few lines that do their part."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = {
    "scontrol": """#!/bin/bash
        if [[ $1 == requeue ]]; then echo "$2" > requeued; else printf 'node-7\\nnode-9\\n'; fi""",
    "srun": """#!/bin/bash
        while [[ $1 == --* ]]; do shift; done
        for ((i = 0; i < SLURM_NTASKS; i++)); do
            SLURM_PROCID=$i SLURM_LOCALID=$((i % SLURM_NTASKS_PER_NODE)) "$@" & tasks+=($!)
        done
        status=0
        for task in "${tasks[@]}"; do wait "$task" || status=$?; done
        exit $status""",
    "python": """#!/bin/bash
        echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT" \\
            "$SRUN_CPUS_PER_TASK $*" > told_$RANK
        exit $STATUS""",
}
JOB = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "node-[7,9]",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_PER_TASK": "12",
}


@pytest.mark.parametrize("status, requeued", [(0, False), (75, True), (1, False)])
def test_every_task_knows_its_place_and_a_saved_run_is_queued_again(tmp_path, status, requeued):
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = JOB | {"STATUS": str(status), "PYTHON": str(tmp_path / "python")}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    script = REPOSITORY / "scripts" / "train.sbatch"
    done = subprocess.run(
        ["bash", str(script), "tiny-pretrain", "--run-dir", "two words"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    for rank in range(4):
        told = (tmp_path / f"told_{rank}").read_text()
        place = f"{rank} {rank % 2} 4 2 node-7 {20000 + 1234567 % 20000} 12"
        assert told == f"{place} -u scripts/train.py tiny-pretrain --run-dir two words\n"
    assert (tmp_path / "requeued").exists() == requeued
