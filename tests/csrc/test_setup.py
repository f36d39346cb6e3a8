"""When an installation builds csrc/, and that it goes on where it does not."""

import platform
import runpy
import shutil
import subprocess

import pytest
import setuptools
from mmalign_kernels.cpu import library as cpu_library

from csrc.build import REPOSITORY


@pytest.fixture
def run_setup(monkeypatch):
    """What setup.py hands to setuptools on a machine with these tools."""

    def run(*tools: str) -> dict:
        handed = {}
        monkeypatch.setattr(setuptools, "setup", lambda **keywords: handed.update(keywords))
        where = {tool: f"/somewhere/{tool}" for tool in tools}
        monkeypatch.setattr(shutil, "which", lambda tool, path=None: where.get(tool))
        runpy.run_path(str(REPOSITORY / "setup.py"))
        return handed

    monkeypatch.delenv("MMALIGN_CUDA_ARCHS", raising=False)
    return run


def test_without_a_compiler_or_a_gpu_it_says_so(run_setup, capsys, monkeypatch):
    assert run_setup("nvcc")["ext_modules"] == []
    assert "no GPU and no MMALIGN_CUDA_ARCHS, so csrc/ is not built" in capsys.readouterr().out
    monkeypatch.setenv("MMALIGN_CUDA_ARCHS", "90a")
    assert run_setup("cmake")["ext_modules"] == []
    assert "no nvcc, so the CUDA kernels of csrc/ are not built" in capsys.readouterr().out


def test_cpu_kernels_need_cmake_and_a_compiler(run_setup, capsys, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    extensions = run_setup("cmake", "g++")["ext_modules"]
    # a failing compiler leaves an installation without them
    assert extensions and all(extension.optional for extension in extensions)
    names = [extension.name.removeprefix("mmalign_kernels.cpu.") for extension in extensions]
    if platform.machine() == "x86_64":
        assert names == ["libmmalign_cpu_avx512", "libmmalign_cpu_avx2"]
    assert cpu_library.file_name().removesuffix(".so") in names
    for tool in ("cmake", "g++"):
        assert run_setup(tool)["ext_modules"] == []
        assert "the CPU kernels of csrc/cpu are not built" in capsys.readouterr().out


def test_named_architectures_need_no_gpu(run_setup, monkeypatch):
    monkeypatch.setenv("MMALIGN_CUDA_ARCHS", "80;90a")
    (extension,) = run_setup("nvcc")["ext_modules"]
    assert extension.name == "mmalign_kernels.cuda.libmmalign_cuda"


def test_cuda_can_be_left_out(run_setup, monkeypatch):
    monkeypatch.setenv("MMALIGN_CUDA_ARCHS", "none")
    assert run_setup("nvcc", "nvidia-smi")["ext_modules"] == []


@pytest.mark.parametrize("archs", ("90", "80;90", "80;100"))
def test_hopper_without_its_suffix_is_refused(archs, run_setup, monkeypatch, tmp_path):
    """Such a build has empty attention and projector kernels."""
    bare = archs.rpartition(";")[2]
    monkeypatch.setenv("MMALIGN_CUDA_ARCHS", archs)
    with pytest.raises(SystemExit, match=f"MMALIGN_CUDA_ARCHS has {bare}, expected {bare}a"):
        run_setup("nvcc")
    monkeypatch.undo()
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    command = ["cmake", "-S", REPOSITORY, "-B", tmp_path, f"-DMMALIGN_CUDA_ARCHS={archs}"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode and f"MMALIGN_CUDA_ARCHS has {bare}" in process.stderr


def test_every_package_is_installed(run_setup):
    files = [
        *REPOSITORY.glob("mmalign/**/*.py"),
        *REPOSITORY.glob("kernels/mmalign_kernels/**/*.py"),
    ]
    folders = {file.parent.relative_to(REPOSITORY).as_posix() for file in files}
    expected = {x.removeprefix("kernels/").replace("/", ".") for x in folders}
    assert set(run_setup()["packages"]) == expected


def test_the_library_lands_where_the_loader_looks(run_setup, monkeypatch):
    from mmalign_kernels.cuda import library as cuda_library

    monkeypatch.setenv("MMALIGN_CUDA_ARCHS", "90a")
    handed = run_setup("nvcc")
    command = handed["cmdclass"]["build_ext"](setuptools.Distribution(handed))
    file = command.get_ext_filename(handed["ext_modules"][0].name)
    assert file == f"mmalign_kernels/cuda/{cuda_library.FILE.name}"
