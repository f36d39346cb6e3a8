"""Makes `lm_eval --model mmalign` known to lm-evaluation-harness.

Release 0.4.13 looks for models in its own table only, before it reads anything of the user's. So
the installation puts mmalign_lm_eval.pth beside the packages: one line that Python runs when it
starts, and that imports this module where the command is lm_eval. Without an installation:
`python -m mmalign.evaluation.lm_eval_registration --model mmalign ...`, with lm_eval's arguments.
"""

import lm_eval.models  # noqa: F401  fills the table; it stays empty where another model comes first
from lm_eval.api.registry import model_registry

if "mmalign" not in model_registry:
    model_registry.register("mmalign", target="mmalign.lm_eval:MmalignLM")

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
