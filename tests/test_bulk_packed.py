"""Pictures of ``bulk`` that are packed: samples in WebDataset's shards, frames in videos."""

import io
import json
import os
import signal
import tarfile

import pytest
from bulk_runs import Page, kill, picture, records
from commands import meanwhile

pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
pytest.importorskip("av", reason="the extra video is not installed")

from pictures_moving import make_clip, times
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

pytestmark = pytest.mark.slow  # on one Python version

OUT = ("-o", "o.jsonl")

# -- shards ------------------------------------------------------------------------------


def write_shard(path, numbers, **members):
    """Write samples as the library does; the ending of the name says how it is packed."""
    with TarWriter(str(path)) as writer:
        for number in numbers:
            sample = {"__key__": f"cats/{number:04}", "jpg": picture(number), **members}
            writer.write({**sample, "txt": f"cat {number}", "json": {"id": number}})


def read_shards(*paths):
    """Return the samples that the library finds; it would leave files open that it opens."""
    samples = []
    for path in paths:
        with path.open("rb") as file:
            samples += group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))
    return samples


def test_shards_go_in_packed_in_any_way_and_shards_come_out(bulk, tmp_path):
    names = ("set.tar", "set.tgz", "set.tar.bz2")
    for number, name in enumerate(names):
        write_shard(tmp_path / name, range(number * 3, number * 3 + 3), cls=b"7", mp4=b"film")
    asked = ("-o", "out/%04d.tar", "--skill", "query", "--question", "Is it a {txt}?")
    for said in ("9 answered, 0 failed", "9 done before"):
        assert said in bulk(*names, *asked)
    lines = {each["row"]["id"]: each for each in records(tmp_path / "out/%04d.tar.jsonl")}
    assert lines[1]["row"] == {"__key__": "cats/0001", "txt": "cat 1", "id": 1, "cls": "7"}
    assert lines[8]["path"] == "tar://cats/0008.jpg::set.tar.bz2"
    samples = read_shards(tmp_path / "out/0000.tar")
    assert not (tmp_path / "out/0001.tar").exists()
    assert sorted(each["__key__"] for each in samples) == [f"cats/{n:04}" for n in range(9)]
    for each in samples:
        line = json.loads(each["json"])
        assert each["jpg"] == picture(line["row"]["id"])
        assert each["txt"].decode() == line["answer"]
        assert line["question"] == f"Is it a cat {line['row']['id']}?"
    write_shard(tmp_path / "set.tar", range(4))  # a sample more, and the others as they were
    assert "1 answered, 0 failed, 3 done before" in bulk("set.tar", *asked)


@pytest.mark.parametrize(
    "way", ["{08..10}.tar", "*.tar", "memory://set/{08..10}.tar", "memory://set/*.tar"]
)
def test_shards_are_named_by_braces_by_patterns_and_elsewhere(bulk, tmp_path, memory, way):
    for number in range(8, 11):
        name = f"{number:02}.tar"
        write_shard(tmp_path / name, [number])
        memory.pipe(f"/set/{name}", (tmp_path / name).read_bytes())
    bulk(way, *OUT, "--report", "report.html")
    assert sorted(each["row"]["id"] for each in records(tmp_path / "o.jsonl")) == [8, 9, 10]
    assert Page(tmp_path / "report.html").tags["img"] == 3  # each is read once more


def test_what_is_odd_in_a_shard_is_told_or_counted_and_the_rest_is_found(
    bulk, tmp_path, monkeypatch
):
    monkeypatch.setattr("moondream_async.cli.bulk.shards.MAX_FILE_BYTES", 5000)
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
        add("b.seg.png", picture(3))
        add("b.jpg", picture(4))
        add("large.jpg", bytes(6000))
    said = bulk("odd.tar", *OUT, status=1)
    lines = {each["path"].split(":")[1]: each for each in records(tmp_path / "o.jsonl")}
    assert set(lines) == {"//a.jpg", "//b.seg.png", "//large.jpg"}
    assert lines["//a.jpg"]["row"] == {"__key__": "a"}
    assert "error" in lines["//large.jpg"]
    assert "1 other file was left out: 1 .mp4" in said
    assert said.count("duplicate") == 1
    bulk("odd.tar", "-o", "texts/", "--column", "jpg", status=1)
    texts = {path.stem for path in (tmp_path / "texts/odd").iterdir()}
    assert texts == {"a", "b"}
    (tmp_path / "cut.tar").write_bytes((tmp_path / "odd.tar").read_bytes()[:3000])
    (tmp_path / "none.tar").write_bytes(b"no tar file")
    said = bulk("cut.tar", "none.tar", "gone.tar", "odd.tar", "-o", "all.jsonl", status=1)
    told = [line for line in said.splitlines() if line.startswith("Can't read")]
    assert [line.split(":")[0] for line in told] == [
        f"Can't read {name}.tar" for name in ("cut", "none", "gone")
    ]
    assert "2 answered" in said


def test_a_shard_is_read_no_further_than_some_megabytes_ahead(bulk, moondream_simulator, tmp_path):
    """What comes first is asked about before all of the shard is there to be read."""
    samples = [picture(), bytes(17_000_000), bytes(30_000), bytes(30_000)]
    with TarWriter(packed := io.BytesIO()) as writer:
        for number, data in enumerate(samples):
            writer.write({"__key__": str(number), "jpg": data})
    packed, requests, asked = packed.getvalue(), moondream_simulator.requests, []
    os.mkfifo(tmp_path / "a.tar")

    def write():
        with (tmp_path / "a.tar").open("wb") as shard:
            shard.write(packed[:-20_000])
            shard.flush()
            moondream_simulator.wait_until(lambda: len(requests) == 1, timeout=60)
            asked.extend(requests)
            shard.write(packed[-20_000:])

    with meanwhile(write):
        assert "1 answered, 3 failed" in bulk("a.tar", *OUT, status=1)
    assert len(asked) == 1


def test_shards_of_any_pictures_have_keys_that_the_library_reads_as_they_are(
    bulk, tmp_path, monkeypatch
):
    monkeypatch.setattr("moondream_async.cli.bulk.shards._SAMPLES", 3)
    long = "é" * 80
    names = ["b/1.v2.JPG", "a/1.jpg", "a/1.jpeg", "../up.png", "__x__/y.jpg", f"{long}.jpg", "n"]
    names = [f"in/{name}" for name in names]
    for number, name in enumerate(["in/a/changed.jpg", "in/broken.jpg", *names]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number) if "broken" not in name else b"")
    asked = ("-o", "%02d.tar")
    bulk("in/a/changed.jpg", "in/broken.jpg", *asked, status=1)
    (tmp_path / "in/a/changed.jpg").write_bytes(b"x")
    (tmp_path / "03.tar").write_bytes(b"of a run with more")
    for name in names:  # one after the other, in this order
        bulk(name, *asked)
    shards = [tmp_path / f"{number:02}.tar" for number in range(3)]
    samples = read_shards(*shards)
    assert [each["__key__"] for each in samples] == [
        *("in/b/1_v2", "in/a/1", "in/a/1-2", "up", "in/__x__/y", f"in/{long}", "in/n")
    ]
    assert samples[0]["jpg"] == picture(2)
    assert all(each["txt"] for each in samples)
    assert not (tmp_path / "03.tar").exists()
    first = [path.read_bytes() for path in shards]
    bulk(*names, *asked)
    assert [path.read_bytes() for path in shards] == first


# -- videos ------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path):
    """Thirty frames, three seconds."""
    return make_clip(tmp_path / "clip.mp4", count=30, rate=10)


def test_a_video_that_was_killed_goes_on_in_the_middle(
    moondream_simulator, bulk, bulk_until, clip, tmp_path
):
    arguments = ("clip.mp4", *OUT, "--concurrency", "1")
    moondream_simulator.faults.extend(["slow_start=0"] * 9 + ["slow_start=300"])

    assert bulk_until(*arguments, when=10, end=kill) == -signal.SIGKILL
    assert len(records(tmp_path / "o.jsonl")) == 9
    assert "21 answered, 0 failed, 9 done before" in bulk(*arguments)
    lines = records(tmp_path / "o.jsonl")
    assert sorted(each["time"] for each in lines) == times(clip)
    assert len({each["path"] for each in lines}) == 30
    assert all("caption" in each for each in lines)
    make_clip(clip, count=20, rate=10)
    assert "20 answered" in bulk(*arguments)  # it is another video


SUBTITLES = {
    "vtt": "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nA ",
    "srt": "1\n00:00:00,000 --> 00:00:01,000\nA ",
}


@pytest.mark.parametrize("ending", SUBTITLES)
def test_captions_of_a_video_are_subtitles(bulk, clip, tmp_path, ending):
    bulk("clip.mp4", "--every", "1s", "-o", f"out.{ending}")
    text = (tmp_path / f"out.{ending}").read_text("utf-8")
    assert text.startswith(SUBTITLES[ending])
    assert text.count(" --> ") == 3
    assert "00:00:02" in text
    found = [each["time"] for each in records(tmp_path / f"out.{ending}.jsonl")]
    assert sorted(found) == times(clip)[::10]
