"""Builds csrc/ beside the Python packages; everything else about them is in pyproject.toml.

CMakeLists.txt builds the CPU kernels where cmake and a C++ compiler are found, and the CUDA kernels
where nvcc is found, if there is a GPU or MMALIGN_CUDA_ARCHS names architectures, e.g. "90a" or
"80;90a;100a"; "none" leaves them out. Without them Triton and plain PyTorch remain:
`python -m mmalign_kernels` lists what is there.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [f"{home}/bin" for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    return subprocess.run([smi, "-L"], capture_output=True, check=False).stdout.startswith(b"GPU")


def named_architectures() -> list[str]:
    archs = re.findall(r"\w+", os.environ.get("MMALIGN_CUDA_ARCHS", ""))
    for arch in {"90", "100"} & set(archs):
        sys.exit(
            f"mmalign: MMALIGN_CUDA_ARCHS has {arch}, expected {arch}a: without the suffix the "
            "attention and projector kernels have no code. Correct it and install again."
        )
    return archs


def cpu_extensions() -> list[Extension]:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if shutil.which("cmake") is None or compiler is None:
        print("mmalign: no cmake or no C++ compiler, so the CPU kernels of csrc/cpu are not built")
        return []
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    return [
        Extension(f"mmalign_kernels.cpu.libmmalign_cpu_{instructions}", sources=[], optional=True)
        for instructions in (("avx512", "avx2") if on_x86 else ("default",))
    ]


def cuda_extensions() -> list[Extension]:
    archs = named_architectures()
    if archs == ["none"]:
        return []
    if find_nvcc() is None:
        print("mmalign: no nvcc, so the CUDA kernels of csrc/ are not built")
    elif not has_gpu() and not archs:
        print("mmalign: no GPU and no MMALIGN_CUDA_ARCHS, so csrc/ is not built")
    else:
        return [Extension("mmalign_kernels.cuda.libmmalign_cuda", sources=[])]
    return []


class CMakeBuild(build_ext):
    """Libraries in mmalign_kernels/{cpu,cuda}; they are not Python modules."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = ext.name.rpartition(".")[2]
        on_gpu = library == "libmmalign_cuda"
        build = ROOT / "build" / ("cuda" if on_gpu else "cpu")
        archs = ";".join(named_architectures()) if on_gpu else "none"
        configure = ["cmake", "-S", ROOT, "-B", build, f"-DMMALIGN_CUDA_ARCHS={archs}"]
        configure += [f"-DMMALIGN_PYTHON={sys.executable}"]
        configure += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"] if on_gpu else []
        command = ["cmake", "--build", build, "--target", library.removeprefix("lib")]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([*command, "--parallel", str(os.cpu_count())], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"mmalign: {library} is not built: {error}") from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / f"{library}.so", target)


setup(
    packages=[
        *find_packages(include=["mmalign", "mmalign.*"]),
        *find_packages("kernels", include=["mmalign_kernels", "mmalign_kernels.*"]),
    ],
    package_dir={"mmalign_kernels": "kernels/mmalign_kernels"},
    ext_modules=cpu_extensions() + cuda_extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
