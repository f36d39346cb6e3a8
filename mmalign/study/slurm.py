"""A study as SLURM job arrays: what needs no other run, then stage 2, then the report."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mmalign.study.identity import Orders
from mmalign.study.plan import Run

_OPTIONS = "--gpus=1 --cpus-per-task=12 --time=24:00:00 --open-mode=append --output=%x-%A-%a.log"
_JOB = """\
{variable}=$(sbatch --parsable --job-name={name} {options} \\
    --array=0-{last} --signal=USR1@300 --requeue{dependency} <<'JOB'
#!/usr/bin/env bash
runs=({runs})
srun --kill-on-bad-exit=0 {command} --only "${{runs[SLURM_ARRAY_TASK_ID]}}"
status=$?
if [ $status = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi # stopped by the signal, and saved
exit $status
JOB
)
"""
_REPORT = """\
sbatch --job-name={name} --time=02:00:00 --output=%x-%j.log{dependency} --wrap {command}
"""


def slurm_script(orders: Orders, chosen: Sequence[Run], arguments: Sequence[str]) -> str:
    """A bash script that submits what is not done. arguments: of study.py, without its options."""
    name = orders.study.settings.name
    command = shlex.join([".venv/bin/python", "scripts/study.py", *arguments])
    todo = [run for run in chosen if orders.state(run) != "done"]
    text, after = _HEAD.format(script=shlex.join([str(Path("scripts/study.py")), *arguments])), ""
    stages = {
        "first": [run for run in todo if run.pretrain is None],
        "second": [run for run in todo if run.pretrain],
    }
    for variable, runs in stages.items():
        if runs:
            text += _JOB.format(
                variable=variable,
                name=f"{name}-{variable}",
                options=_OPTIONS,
                last=len(runs) - 1,
                runs=" ".join(shlex.quote(run.name) for run in runs),
                command=command,
                dependency=after,
            )
            after = f" --dependency=afterany:${variable}"
    report = shlex.quote(f"{command} --report")
    return text + _REPORT.format(name=f"{name}-report", dependency=after, command=report)


_HEAD = """\
#!/usr/bin/env bash
# python {script} --slurm > submit.sh; read it, then: bash submit.sh
# Edit the options of sbatch (partition, account, time). A requeued task continues its run.
set -euo pipefail
"""
