"""A run that meets its fate after a given step, in a process of its own.

python -m tests.training.train_interrupted CONFIG.pickle {kill,stop,fill-disk} STEP
"""

import os
import pickle
import resource
import signal
import sys

from mmalign.errors import UserError
from mmalign.training.loop import train
from mmalign.training.metrics import Metrics


def main() -> None:
    path, fate, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with open(path, "rb") as file:
        config = pickle.load(file)
    log = Metrics.log

    def log_and_meet_fate(metrics, record):
        log(metrics, record)
        if record["step"] == step and fate == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if record["step"] == step and fate == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if record["step"] == step and fate == "fill-disk":  # a limit on file sizes stands in
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    Metrics.log = log_and_meet_fate
    try:
        train(config)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
