"""Damaged archives: an error with the sample's id, and what to do."""

import gzip
import re
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from mmalign.data.archive import MAX_PICTURE_BYTES
from mmalign.data.archives import open_archive
from mmalign.data.check import check_samples
from mmalign.errors import SampleError, UserError
from tests.data.test_archives import add_to_tar, contents, write_tar, write_zip

BAD = "5.png"  # the picture of sample-5, which a test damages


def without(write):
    """The archive lacks the picture."""
    return lambda path, files: write(path, {x: files[x] for x in files if x != BAD})


def with_entry(offset: int, value: bytes):
    """Other bytes in the picture's entry of the zip's directory."""

    def damage(path: Path, files: dict[str, bytes]) -> None:
        content = bytearray(write_zip(path, files, zipfile.ZIP_DEFLATED).read_bytes())
        entry = content.rindex(b"PK\1\2", 0, content.rindex(BAD.encode()))
        content[entry + offset : entry + offset + len(value)] = value
        path.write_bytes(content)

    return damage


def with_bytes(change):
    return lambda path, files: write_zip(path, files | {BAD: change(files[BAD])})


def overwrite(path: Path, files: dict[str, bytes]) -> None:
    content = bytearray(write_zip(path, files).read_bytes())
    begin = content.index(files[BAD])
    content[begin - 35 : begin + 20] = bytes(55)
    path.write_bytes(content)


def bomb(path: Path, files: dict[str, bytes]) -> None:
    """50 MB, of which it declares 10."""
    write_zip(path, files | {BAD: bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    for place in (content.index(b"\0\0" + BAD.encode()) - 6, content.rindex(BAD.encode()) - 22):
        content[place : place + 4] = struct.pack("<I", 10_000_000)
    path.write_bytes(content)


def link_in_zip(path: Path, files: dict[str, bytes]) -> None:
    without(write_zip)(path, files)
    info = zipfile.ZipInfo(BAD)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")


def in_tar(**fields):
    """The picture's entry is something else, as its fields say."""

    def damage(path: Path, files: dict[str, bytes]) -> None:
        without(write_tar)(path, files)
        with tarfile.open(path, "a") as archive:
            add_to_tar(archive, BAD, **fields)

    return damage


def sparse(path: Path, files: dict[str, bytes]) -> None:
    """The picture takes less than its size, as of tar --sparse; the others follow."""
    size = {"major": "1", "minor": "0", "name": BAD, "realsize": "5000000"}
    with tarfile.open(path, "w") as archive:
        content = b"1\n0\n20\n".ljust(512, b"\0") + bytes(20)
        add_to_tar(archive, BAD, content, pax_headers={f"GNU.sparse.{x}": size[x] for x in size})
        for name in files.keys() - {BAD}:
            add_to_tar(archive, name, files[name])


def twice(path: Path, files: dict[str, bytes]) -> None:
    write_tar(path, files)
    with tarfile.open(path, "a") as archive:
        add_to_tar(archive, BAD, b"another")


LARGE, SMALL = (struct.pack("<I", size) for size in (MAX_PICTURE_BYTES + 1, 10))
LINK = "is a link, and none is followed"
DAMAGED = {
    "missing": (without(write_zip), "no file '5.png' in .*, which has such as '1.png'"),
    "missing in a tar": (without(write_tar), "no file '5.png' in"),
    "encrypted": (with_entry(8, b"\1"), "is encrypted. Pack it again without"),
    "another method": (with_entry(10, b"\x0e"), "another way than deflate"),
    "checksum": (with_entry(16, bytes(4)), "its checksum is not"),
    "too large": (with_entry(24, LARGE), r"is too large \(268,435,457 bytes\)"),
    "too small": (with_entry(24, SMALL), "holds more than the 10 bytes"),
    "another place": (with_entry(42, bytes(4)), "is damaged"),
    "bomb": (bomb, "holds more than the 10,000,000 bytes that it declares"),
    "overwritten": (overwrite, "its header is not where the directory says"),
    "link": (link_in_zip, LINK),
    "symbolic link in a tar": (in_tar(type=tarfile.SYMTYPE, linkname="1.png"), LINK),
    "hard link": (in_tar(type=tarfile.LNKTYPE, linkname="1.png"), LINK),
    "sparse": (sparse, "has its holes left out. Pack it again .tar without --sparse"),
    "device": (in_tar(type=tarfile.CHRTYPE), "is not a regular file"),
    "FIFO": (in_tar(type=tarfile.FIFOTYPE), "is not a regular file"),
    "two of one name": (twice, "has 2 files of the name '5.png'"),
    "no picture": (with_bytes(lambda x: b"text"), "archive/5.png cannot be decoded"),
    "broken picture": (with_bytes(lambda x: x[:-200]), "archive/5.png cannot be decoded"),
}


@pytest.mark.parametrize("damage, problem", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_member_names_the_sample(world, damage, problem):
    path = world.root / "archive"
    damage(path, contents(world))
    dataset = world.dataset(image_root=str(path), on_bad_sample="skip")
    report = check_samples(dataset, num_workers=0, progress=False)
    [error] = report.skipped
    assert error.sample_id == "sample-5" and len(report.kept) == 19
    with pytest.raises(SampleError, match=f"sample 'sample-5': .*{problem}"):
        check_samples(world.dataset(image_root=str(path)), num_workers=0, progress=False)


def test_a_bomb_takes_no_memory(world):
    """What is beyond the declared size is not unpacked."""
    import tracemalloc

    path = world.root / "archive"
    bomb(path, contents(world))
    member = open_archive(path).find(BAD)
    tracemalloc.start()
    with pytest.raises(UserError):
        member.read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25_000_000


def cut(write, place):
    """The archive ends at place(its bytes, the picture's bytes)."""

    def damage(path: Path, files: dict[str, bytes]) -> None:
        content = write(path, files).read_bytes()
        path.write_bytes(content[: place(content, files[BAD])])

    return damage


def gzipped(path: Path, files: dict[str, bytes]) -> None:
    path.write_bytes(gzip.compress(write_tar(path, files).read_bytes()))


UNREADABLE = {
    "end of a zip": (cut(write_zip, lambda x, _: len(x) - 1), "not a complete zip archive .* repe"),
    "directory of a zip": (cut(write_zip, lambda x, _: len(x) - 700), "not a complete zip archive"),
    "within a zip": (cut(write_zip, lambda x, bad: x.index(bad) + 9), "not a complete zip archive"),
    "start of a zip": (cut(write_zip, lambda x, _: 3), "neither a folder nor a zip, tar"),
    "start of a tar": (cut(write_tar, lambda x, _: 300), "neither a folder nor a zip, tar"),
    "nothing": (cut(write_tar, lambda x, _: 0), "is empty"),
    "LFS": (lambda path, _: path.write_text("version https://git-lfs"), "git lfs pull"),
    "gzip": (gzipped, "compressed with gzip, so .* unpacking all before it"),
    "last part of a zip": (with_entry(34, b"\1"), "last of several parts.*join them .zip -s 0"),
    "empty zip": (lambda path, _: write_zip(path, {}), "has no files in it"),
    "empty tar": (lambda path, _: write_tar(path, {}), "neither a folder nor a zip, tar"),
}


@pytest.mark.parametrize("damage, problem", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_archive_names_the_first_sample_that_it_is_for(world, damage, problem):
    path = world.root / "archive"
    damage(path, contents(world))
    expected = f"sample 'sample-1': its image '1.png' cannot be read. .*archive .*{problem}"
    for bad in ("error", "skip"):
        with pytest.raises(SampleError, match=expected):
            world.dataset(image_root=str(path), on_bad_sample=bad)
    for sample in world.samples[:10]:
        if "image" in sample:
            sample["image"] = "other/1.png"
    with pytest.raises(SampleError, match="sample 'sample-10': its image '10.png' cannot be read"):
        world.dataset(image_root=(f"other={world.root / 'images'}", str(path)))
    for sample in world.samples:
        sample.pop("image", None)
    with pytest.raises(UserError, match=problem):
        world.dataset(image_root=str(path))


CUT_TARS = {
    "within the picture": (lambda x, bad: x.index(bad) + 9, "5.png is cut short: the archive ends"),
    "before it": (
        lambda x, bad: x.index(bad) - 512,
        "no file '5.png'.*archive is not complete: no header at byte 63,488, and no",
    ),
    "within its header": (
        lambda x, bad: x.index(bad) - 9,
        "no file '5.png'.*archive is not complete: ",
    ),
    "end mark": (lambda x, _: len(x.rstrip(b"\0")) + 100, None),
}


@pytest.mark.parametrize("place, problem", CUT_TARS.values(), ids=CUT_TARS)
def test_a_cut_tar_lacks_the_pictures_behind_the_cut(world, caplog, place, problem):
    path, files = world.root / "archive", contents(world)
    cut(write_tar, place)(path, files)
    lacking = [f"sample-{i}" for i in (5, 6, 7, 9)] if problem else []  # in the order of names
    dataset = world.dataset(image_root=str(path), on_bad_sample="skip")
    report = check_samples(dataset, num_workers=0, progress=False)
    assert [error.sample_id for error in report.skipped] == lacking
    assert re.search(r"archive is not complete \(.+\): samples whose pictures", caplog.text)
    if problem:
        assert "Download or copy the archive again" in str(report.skipped[0])
        with pytest.raises(SampleError, match=f"sample 'sample-5': .*{problem}"):
            check_samples(world.dataset(image_root=str(path)), num_workers=0, progress=False)


def test_tars_that_cat_has_joined(world):
    path, files = world.root / "archive", contents(world)
    first = write_tar(path, {x: y for x, y in files.items() if x != BAD}).read_bytes()
    path.write_bytes(first + write_tar(path, {BAD: files[BAD]}).read_bytes())
    with pytest.raises(
        SampleError, match="sample 'sample-5': .*follows its end mark .* tar --conc"
    ):
        check_samples(world.dataset(image_root=str(path)), num_workers=0, progress=False)


def test_a_member_before_the_beginning(tmp_path):
    """The directory lies one byte before the place that the end of the zip has for it."""
    path = write_zip(tmp_path / "archive", {"1.png": b"x"})
    content = bytearray(path.read_bytes())
    content[-6:-2] = struct.pack("<I", struct.unpack("<I", content[-6:-2])[0] + 1)
    path.write_bytes(content)
    with pytest.raises(UserError, match="its header is not where the directory says"):
        open_archive(path).find("1.png").read()


def test_a_root_that_does_not_exist(world):
    with pytest.raises(UserError, match="is not a folder or archive"):
        world.dataset(image_root=str(world.root / "absent.zip"))


def test_an_archive_that_changes_while_it_is_used(world):
    path = write_zip(world.root / "archive", contents(world))
    dataset = world.dataset(image_root=str(path))
    write_zip(path, contents(world) | {"more.png": b"x"})
    with pytest.raises(SampleError, match="sample 'sample-1': .*has changed while it was read"):
        dataset.load_pixels(1)
