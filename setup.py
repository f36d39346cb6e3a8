"""Two packages: mmalign (the trainer) and mmalign_kernels (its operations, usable alone).

CMakeLists.txt builds the CUDA kernels of csrc/ where nvcc is found, and either there is a card or
MMALIGN_CUDA_ARCHS says what to build for, e.g. "90a" or "80;90a;100a". Elsewhere the installation
goes without them: Triton and plain PyTorch remain. `python -m mmalign_kernels` shows what is here.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [f"{home}/bin" for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def has_card() -> bool:
    smi = shutil.which("nvidia-smi")
    return bool(smi) and subprocess.run([smi, "-L"], capture_output=True).stdout.startswith(b"GPU")


def cuda_extensions() -> list[Extension]:
    if find_nvcc() is None:
        print("mmalign: no nvcc, so the CUDA kernels of csrc/ are not built")
    elif not has_card() and not os.environ.get("MMALIGN_CUDA_ARCHS"):
        print("mmalign: no GPU and no MMALIGN_CUDA_ARCHS, so csrc/ is not built")
    else:
        return [Extension("mmalign_kernels.libmmalign_cuda", sources=[])]
    return []


class CMakeBuild(build_ext):
    """The library, beside the package's Python files; it is no Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / "cuda"
        archs = ";".join(re.findall(r"\w+", os.environ.get("MMALIGN_CUDA_ARCHS", "")))
        configure = ["cmake", "-S", ROOT, "-B", build, f"-DMMALIGN_CUDA_ARCHS={archs}"]
        configure += [f"-DMMALIGN_PYTHON={sys.executable}", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        subprocess.run(configure, check=True)
        command = ["cmake", "--build", build, "--target", "mmalign_cuda", "--parallel"]
        subprocess.run([*command, str(os.cpu_count())], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / "libmmalign_cuda.so", target)


setup(
    name="mmalign",
    version="0.1.0",
    description="LLaVA training on packed batches and text-only alignment evaluation",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mmalign", "mmalign.*"]) + ["mmalign_kernels"],
    package_dir={"mmalign_kernels": "kernels/mmalign_kernels"},
    ext_modules=cuda_extensions(),
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[
        "torch>=2.11",
        "docstring-parser",
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
        # BLEU and ROUGE of truthfulqa_gen
        "generation": ["rouge-score", "sacrebleu"],
        # python -m mmalign.lm_eval; lm_eval asks for the version of transformers at its end
        "harness": ["lm_eval", "transformers"],
        # the oracles that the tests compare with
        "test": [
            "accelerate",
            "lm_eval",
            "nvidia-ml-py",
            "peft",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "rouge-score",
            "ruff",
            "sacrebleu",
            "scipy",
            "transformers",
            "triton",
        ],
    },
)
