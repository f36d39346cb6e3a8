"""Two packages: mmalign (the trainer) and mmalign_kernels (its operations, usable alone)."""

from setuptools import find_packages, setup

setup(
    name="mmalign",
    version="0.1.0",
    description="LLaVA training on packed batches and text-only alignment evaluation",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["mmalign", "mmalign.*"]) + ["mmalign_kernels"],
    package_dir={"mmalign_kernels": "kernels/mmalign_kernels"},
    install_requires=[
        "torch>=2.11",
        "numpy",
        "matplotlib",
        "pillow",
        "rich",
        "safetensors",
        "sentencepiece>=0.2.2",
        "tensorboard",
        "tokenizers",
        "tqdm",
        "tyro",
    ],
    extras_require={
        "triton": ["triton"],
        # power, clocks and temperature of an NVIDIA card in metrics.jsonl
        "nvidia": ["nvidia-ml-py"],
        # the oracles that the tests compare with
        "test": [
            "accelerate",
            "lm_eval",
            "nvidia-ml-py",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "transformers",
            "triton",
        ],
    },
)
