"""mmalign: what visual instruction tuning does to a language model's truthfulness and ethics.

    data/          files -> packed batches: batch.py, the contract with the model
    model/         vision tower, projector and decoder; reads and writes Hugging Face folders
    training/      both stages of config.py's TrainConfig, whose named runs are in recipes.py
    evaluation/    scores of language models, their comparison and report
    toy_world/     a small world that all of this runs on
    study/         many runs with a verdict on each question that is asked of them
    chat.py, lm_eval.py: other uses of a trained model

distributed.py, files.py, flops.py, system.py and tokenizer/ serve all of them. malloc.py and
openmp.py set up the libraries under PyTorch; openmp.py has its effect here, before it is loaded.
"""

from mmalign.openmp import choose_how_threads_wait

__version__ = "0.1.0"
choose_how_threads_wait()
