"""WebDataset's shards in ``bulk``: written and read by that library, and gone on from."""

import io
import json
import sys
import tarfile

import pytest
from PIL import Image

pytest.importorskip("webdataset", reason="the extra webdataset is not installed")

from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from moondream_async.cli.bulk import shards
from moondream_async.cli.bulk.finding import Finder
from moondream_async.cli.bulk.search import Search
from moondream_async.cli.bulk.sources import PictureFile
from moondream_async.errors import MissingExtraError


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (number % 256, 80, 20)).save(file, "JPEG")
    return file.getvalue()


def write_shard(path, numbers, **members):
    """Write samples as the library does; the ending of the name says how it is packed."""
    with TarWriter(str(path)) as writer:
        for number in numbers:
            sample = {"__key__": f"cats/{number:04}", "jpg": picture(number), **members}
            writer.write({**sample, "txt": f"cat {number}", "json": {"id": number}})
    return path.name


def read_shards(*paths):
    """Return the samples that the library finds; it would leave files open that it opens."""
    samples = []
    for path in paths:
        with path.open("rb") as file:
            opened = tar_file_expander([{"url": str(path), "stream": file}])
            samples += group_by_keys(opened)
    return samples


@pytest.mark.parametrize("ending", ["tar", "tgz", "tar.bz2"])
def test_a_sample_is_a_picture_with_its_texts_as_a_row(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    name = write_shard(tmp_path / f"set.{ending}", range(3), cls=b"7", mp4=b"film")
    found = list(Search().find([name]))
    assert [each.below for each in found] == [f"set/cats/{n:04}.jpg" for n in range(3)]
    assert found[1].row == {"__key__": "cats/0001", "txt": "cat 1", "id": 1, "cls": "7"}
    assert found[1].path == f"tar://cats/0001.jpg::{name}"
    for each in reversed(found):
        again = PictureFile(type(each)(each.path, each.below))  # as who made a report
        assert again.read() == PictureFile(each).read() == each.data
        assert again.contents == each.contents


def test_shards_are_named_by_braces_by_patterns_and_elsewhere(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for number in range(8, 11):
        name = write_shard(tmp_path / f"{number:02}.tar", [number])
        files.pipe(f"/set/{name}", (tmp_path / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    for way in ("{08..10}.tar", "*.tar", "memory://set/{08..10}.tar", "memory://set/*.tar"):
        found = sorted(Search().find([way]), key=lambda each: each.below)
        assert [each.row["id"] for each in found] == [8, 9, 10]
        assert all(PictureFile(type(each)(each.path, "")).read() == each.data for each in found)
    files.rm("/set", recursive=True)


def test_what_is_odd_in_a_shard_is_told_or_counted_and_the_rest_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_FILE_BYTES", 5000)
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:

        def add(name, data, kind=tarfile.REGTYPE):
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, "/etc/passwd"
            archive.addfile(member, io.BytesIO(data))

        add("__index__/a.json", b"{}")
        add("a.jpg", picture(1))
        add("a.JPG", picture(2))  # the same end
        add("a.json", b"[1]")
        add("link.jpg", b"", tarfile.SYMTYPE)
        add("film.mp4", b"x")
        add("b.seg.png", b"mask")
        add("b.jpg", picture(3))
        add("large.jpg", bytes(6000))
    whole = (tmp_path / "odd.tar").read_bytes()
    said = []
    search = Search(said.append)
    found = list(search.find([str(tmp_path / "odd.tar")]))
    assert [each.below for each in found] == ["odd/a.jpg", "odd/b.seg.png", "odd/large.jpg"]
    assert found[0].row == {"__key__": "a"}
    assert found[2].data is None  # and is refused when its turn comes
    assert search.left_out == {".mp4": 1}
    assert len(said) == 1
    assert "duplicate" in said[0]
    by_end = Search(column="jpg").find([str(tmp_path / "odd.tar")])
    assert [each.below for each in by_end] == ["odd/a.jpg", "odd/b.jpg", "odd/large.jpg"]
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    (tmp_path / "none.tar").write_bytes(b"no tar file")
    said.clear()
    names = [str(tmp_path / each) for each in ("cut.tar", "none.tar", "gone.tar", "odd.tar")]
    assert len(list(Search(said.append).find(names))) >= 3
    assert [each.split(":")[0].rpartition("/")[2] for each in said[:3]] == [
        "cut.tar",
        "none.tar",
        "gone.tar",
    ]


async def test_a_shard_is_read_no_further_than_is_asked_about(tmp_path, monkeypatch):
    """Neither to count what is in it nor to have more than some megabytes ahead."""
    monkeypatch.setattr("moondream_async.cli.bulk.finding._CHUNK_BYTES", 2000)
    write_shard(tmp_path / "a.tar", range(500))
    finder = Finder([str(tmp_path / "a.tar")], [])
    assert await finder.count() is None
    chunks = finder.chunks()
    assert sum(len(each.data) for each in await anext(chunks)) < 4000
    await chunks.aclose()


def test_webdataset_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(MissingExtraError, match=r"moondream-async\[webdataset\]"):
        list(Search().find([str(tmp_path / "a.tar")]))


@pytest.mark.slow
async def test_shards_go_in_and_shards_come_out(bulk, tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"in-{number}.tar", range(number * 5, number * 5 + 5))
    asked = ("--skill", "query", "--question", "Is it a {txt}?")
    for said_of in ("10 answered, 0 failed", "10 done before"):
        said = await bulk("in-{0..1}.tar", "-o", "out/%04d.tar", *asked)
        assert said_of in said
    samples = read_shards(tmp_path / "out/0000.tar")
    assert not (tmp_path / "out/0001.tar").exists()
    assert sorted(each["__key__"] for each in samples) == [f"cats/{n:04}" for n in range(10)]
    for each in samples:
        line = json.loads(each["json"])
        assert each["jpg"] == picture(line["row"]["id"])
        assert each["txt"].decode() == line["answer"]
        assert line["question"] == f"Is it a cat {line['row']['id']}?"
    write_shard(tmp_path / "in-1.tar", range(4, 10))  # a sample more, and the others as they were
    said = await bulk("in-1.tar", "-o", "out/%04d.tar", *asked)
    assert "1 answered, 0 failed, 5 done before" in said
    (tmp_path / "other.tar").write_bytes(b"somebody's")
    said = await bulk("in-1.tar", "-o", "other.tar", *asked, status=1)
    assert "no run has made it" in said


def test_shards_of_any_pictures_have_keys_that_the_library_reads_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SAMPLES", 3)
    monkeypatch.chdir(tmp_path)
    names = (
        "b/1.v2.JPG",
        "a/1.jpg",
        "a/1.jpeg",
        "../up.png",
        "__x__/y.jpg",
        "é" * 80 + ".jpg",
        "n",
    )
    shards_of = [f"{n:02}.tar" for n in range(4)]
    (tmp_path / "03.tar").write_bytes(b"of a run with more")
    folder = tmp_path / "in"
    lines = []
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
        file = PictureFile(next(Search().find([str(path)])))
        file.read()
        contents = {each: getattr(file.contents, each) for each in ("size", "mtime_ns", "sha256")}
        lines.append({"path": str(path.relative_to(tmp_path)), "file": contents, "caption": "C"})
    lines.append({**lines[0], "error": {"message": "no"}})
    lines.append({**lines[0], "path": "in/changed.jpg"})
    (folder / "changed.jpg").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    lines[4]["path"] = "in/../in/__x__/y.jpg"
    shards.write_shards(lambda: lines, "%02d.tar")
    samples = read_shards(*(tmp_path / each for each in shards_of[:3]))
    assert [each["__key__"] for each in samples] == [
        *("in/b/1_v2", "in/a/1", "in/a/1-2", "in/up", "in/in/__x__/y", f"in/{'é' * 80}", "in/n")
    ]
    assert samples[0]["jpg"] == picture(0)
    assert all(each["txt"] == b"C" for each in samples)
    assert not (tmp_path / "03.tar").exists()
    first = [(tmp_path / each).read_bytes() for each in shards_of[:3]]
    shards.write_shards(lambda: lines, "%02d.tar")
    assert [(tmp_path / each).read_bytes() for each in shards_of[:3]] == first


def test_a_shard_is_replaced_only_when_it_is_whole(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "out.tar").write_bytes(b"the old one")

    def records():
        file = PictureFile(next(Search().find([str(tmp_path / "a.jpg")])))
        file.read()
        contents = {each: getattr(file.contents, each) for each in ("size", "mtime_ns", "sha256")}
        yield {"path": str(tmp_path / "a.jpg"), "file": contents, "caption": "C"}
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        shards.write_shards(records, str(tmp_path / "out.tar"))
    assert (tmp_path / "out.tar").read_bytes() == b"the old one"
    assert {each.name for each in tmp_path.iterdir()} == {"a.jpg", "out.tar"}
