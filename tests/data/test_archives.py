"""Pictures in zip and tar archives: the bytes that Python's own readers find."""

import io
import multiprocessing
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mmalign.data.archives import open_archive
from mmalign.data.pictures import Pictures
from mmalign.errors import SampleError

BAD = "5.png"


def contents(world) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((world.root / "images").iterdir())}


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def add_to_tar(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(content))


def write_tar(path: Path, files: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in files.items():
            add_to_tar(archive, name, content)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_gives_the_bytes_that_zipfile_does(tmp_path, method):
    rng = np.random.default_rng(0)
    files = {f"a/{i}.bin": rng.bytes(i * i) + bytes(i) for i in range(200)}
    files |= {"ü/ä ☃.bin": b"snow", "x" * 300 + ".bin": b"long", "a/": b""}
    path = write_zip(tmp_path / "all.zip", files, method)
    archive = open_archive(path)
    with zipfile.ZipFile(path) as expected:
        names = [info.filename for info in expected.infolist() if not info.is_dir()]
        assert len(archive) == len(names) == len(files) - 1
        assert all(archive.find(name).read() == expected.read(name) for name in names)
    assert archive.find("a/") is archive.find("b/1.bin") is archive.find("1.bin") is None


def test_names_in_utf_8_without_the_flag(tmp_path):
    path = write_zip(tmp_path / "all.zip", {"ü/☃.bin": b"snow", "a.bin": b"a"})
    content = bytearray(path.read_bytes())
    content[7] &= ~8
    content[content.index(b"PK\1\2") + 9] &= ~8
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist()[0] != "ü/☃.bin"
    assert open_archive(path).find("ü/☃.bin").read() == b"snow"


def test_a_zip_behind_a_program(tmp_path):
    """As those that unpack themselves: unzip finds its end."""
    path = write_zip(tmp_path / "all.zip", {"a.bin": b"a", "b.bin": b"b"})
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    assert open_archive(path).find("b.bin").read() == b"b"


def test_names_of_windows(tmp_path):
    """Some programs write backslashes; on Unix a name may have one."""
    for system, name in ((0, "a/1.png"), (3, "a\\1.png")):
        info = zipfile.ZipInfo("a\\1.png")
        info.create_system = system
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            archive.writestr(info, b"x")
        assert open_archive(tmp_path / "all.zip").find(name).read() == b"x"


def test_a_tar_as_it_was_before_ustar(tmp_path):
    content = bytearray(write_tar(tmp_path / "all.tar", {"1.png": b"x"}).read_bytes())
    content[257:265], content[148:156] = bytes(8), b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "all.tar").write_bytes(content)
    assert open_archive(tmp_path / "all.tar").find("1.png").read() == b"x"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_gives_the_bytes_that_tarfile_does(tmp_path, kind):
    rng = np.random.default_rng(0)
    files = {f"./a/{i}.bin": rng.bytes(i * i) for i in range(60)}
    if kind != tarfile.USTAR_FORMAT:
        files |= {"a/" + "x" * 300 + ".bin": b"long", "ü/☃.bin": b"snow"}
    path = write_tar(tmp_path / "all.tar", files, kind)
    archive = open_archive(path)
    with tarfile.open(path) as expected:
        for name in files:
            member = archive.find(name.removeprefix("./"))
            assert member.read() == expected.extractfile(name).read()
    assert len(archive) == len(files)


def test_offsets_beyond_4_gigabytes(tmp_path):
    """zip64, in a file with a hole: it takes no space on the disk."""
    path = tmp_path / "large.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("first.bin", b"first")
        archive.start_dir = 5 << 30  # where the next member goes
        archive.writestr("second.bin", b"second")
        with archive.open("third.bin", "w", force_zip64=True) as file:
            file.write(b"third")
    assert path.stat().st_size > 5 << 30
    archive = open_archive(path)
    assert [archive.find(f"{x}.bin").read() for x in ("first", "second", "third")] == [
        b"first",
        b"second",
        b"third",
    ]


def test_the_index_is_small(tmp_path):
    files = {f"train2017/{i:012}.jpg": b"" for i in range(20_000)}
    index = pickle.dumps(open_archive(write_zip(tmp_path / "many.zip", files)))
    assert len(index) < 100 * len(files)


def read_in_a_process(archive, names: list[str], connection) -> None:
    connection.send([archive.find(name).read() for name in names])


def test_processes_read_one_archive_at_once(tmp_path):
    """After fork and after pickling; each reads in another order."""
    files = {f"{i}.bin": bytes([i]) * 50_000 for i in range(64)}
    archive = open_archive(write_zip(tmp_path / "all.zip", files))
    assert archive.find("0.bin").read() == files["0.bin"]  # opened before the fork
    started = []
    for number, method in enumerate(["fork", "fork", "fork", "spawn"]):
        names = [str(x) + ".bin" for x in np.random.default_rng(number).permutation(64)] * 3
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(target=read_in_a_process, args=(archive, names, theirs))
        process.start()
        started.append((process, names, ours))
    for process, names, connection in started:
        assert connection.recv() == [files[name] for name in names]
        process.join()


# ---- which member a name means ----


def found(roots: list, name: str) -> str:
    return str(Pictures([str(x) for x in roots], follow_links=False).find("s", name))


def test_names_inside_the_only_folder_of_an_archive(tmp_path):
    nested = {"train2017/1.jpg": b"1", "train2017/2/3.jpg": b"3", "__MACOSX/train2017/._1.jpg": b""}
    for path in (write_zip(tmp_path / "a.zip", nested), write_tar(tmp_path / "a.tar", nested)):
        for name in ("train2017/1.jpg", "1.jpg", "./1.jpg", "x/../1.jpg"):
            assert found([path], name) == f"{path}/train2017/1.jpg"
        assert found([path], "2/3.jpg") == f"{path}/train2017/2/3.jpg"
        with pytest.raises(SampleError, match="no file '3.jpg' in .*has such as 'train2017/1.jpg'"):
            found([path], "3.jpg")
    mixed = write_zip(tmp_path / "b.zip", nested | {"other.jpg": b""})
    with pytest.raises(SampleError, match=r"sample 's': no file '1.jpg' in .*b\.zip"):
        found([mixed], "1.jpg")
    both = write_zip(tmp_path / "c.zip", {"a/1.jpg": b"", "a/a/1.jpg": b""})
    assert found([both], "a/1.jpg") == f"{both}/a/1.jpg"  # as it stands comes first


def test_several_roots(tmp_path):
    folder = tmp_path / "loose"
    folder.mkdir()
    for name in ("1.jpg", "both.jpg"):
        (folder / name).touch()
    first = write_zip(tmp_path / "b.zip", {"images/2.jpg": b"", "images/both.jpg": b""})
    second = write_tar(tmp_path / "c.tar", {"images/2.jpg": b"", "3.jpg": b""})
    roots = [folder, first, second]
    assert found(roots, "1.jpg") == str(folder / "1.jpg")
    assert found(roots, "3.jpg") == f"{second}/3.jpg"
    for name, where in (("both.jpg", "loose/both.jpg, .*b.zip"), ("images/2.jpg", "b.zip.*c.tar")):
        with pytest.raises(SampleError, match=f"sample 's': .*in several roots: .*{where}"):
            found(roots, name)
    apart = [folder, f"gqa={first}", f"vg/={second}"]
    assert found(apart, "gqa/both.jpg") == f"{first}/images/both.jpg"
    assert found(apart, "gqa/images/2.jpg") == f"{first}/images/2.jpg"
    assert found(apart, "vg/images/2.jpg") == f"{second}/images/2.jpg"
    assert found(apart, "both.jpg") == str(folder / "both.jpg")
    with pytest.raises(SampleError, match="no file '4.jpg' in .*loose, gqa=.*b.zip, vg=.*c.tar"):
        found(apart, "4.jpg")


@pytest.mark.parametrize("name", ["../5.png", "/etc/passwd", "a/../../5.png", ".."])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_that_leave_the_archive(tmp_path, write, name):
    path = write(tmp_path / "archive", {"../5.png": b"x", "/etc/passwd": b"x", "5.png": b"x"})
    with pytest.raises(SampleError, match="sample 's': .*outside the image root .*archive"):
        found([path], name)


def test_the_directory_says_whether_a_picture_has_changed(world):
    files = contents(world)
    changed = files | {BAD: files[BAD][:-1] + b"?"}  # of the same size
    first = open_archive(write_zip(world.root / "a", files)).fingerprint
    assert open_archive(write_zip(world.root / "b", files)).fingerprint == first
    assert open_archive(write_zip(world.root / "b", changed)).fingerprint != first
    for name in ("a", "b"):
        with tarfile.open(world.root / name, "w") as archive:
            add_to_tar(archive, BAD, b"12", mtime=5 if name == "a" else 6)
    assert len({open_archive(world.root / name).fingerprint for name in "ab"}) == 2
