"""Where the pictures of ``bulk`` come from: paths, lists, tables and addresses.

Shards and videos, which hold many pictures, are in `test_bulk_packed`.
"""

import csv
import json
import os
import sys
import zipfile

import pytest
from aiohttp import web
from bulk_runs import Page, make_pictures, paths_of, picture, records
from commands import meanwhile
from remote_server import serving_pages

pytestmark = pytest.mark.slow  # on one Python version

OUT = ("-o", "o.jsonl")


def names_below(folder, root):
    return sorted(str(path.relative_to(root)) for path in folder.rglob("*.jpg"))


# -- paths and lists ---------------------------------------------------------------------

WAYS = {
    "stdin": ["-"],
    "fifo": ["--from-file", "pipe"],
    "pattern": ["photos/*/*.jpg", "photos/*.jpg"],
    "twice": ["photos/*.jpg", "photos/../photos", "--from-file", "list"],
}


@pytest.mark.parametrize("way", WAYS)
def test_pictures_are_named_in_several_ways_and_asked_about_once(bulk, photos, tmp_path, way):
    names = names_below(photos, tmp_path)
    lines = "".join(f"{name}\r\n" for name in names)
    (tmp_path / "list").write_text(lines)
    os.mkfifo(tmp_path / "pipe")
    with meanwhile(lambda: way == "fifo" and (tmp_path / "pipe").write_text(lines)):
        bulk(*WAYS[way], *OUT, stdin=lines.encode())
    assert paths_of(records(tmp_path / "o.jsonl")) == names


SIMPLEST = {
    "a/./b//c.jpg": "a/b/c.jpg",
    "./a.jpg": "a.jpg",
    "a/../b.jpg": "b.jpg",
    "../b.jpg": "../b.jpg",
    "../../a/../c.jpg": "../../c.jpg",
    "link/../x.jpg": "link/../x.jpg",
    "/../a.jpg": "/../a.jpg",
}


def test_a_path_is_made_simple_without_leading_elsewhere(bulk, tmp_path):
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    bulk(*SIMPLEST, *SIMPLEST.values(), *OUT, status=1)
    assert paths_of(records(tmp_path / "o.jsonl")) == sorted(SIMPLEST.values())


LISTS = [  # the ends of lines, with or without the last one, and the encoding
    ("\n", True, "utf-8"),
    ("\n", False, "utf-8"),
    ("\r\n", True, "utf-8"),
    ("\n", True, "utf-8-sig"),
    ("\r\n", True, "utf-16"),
    ("\0", True, "utf-8"),
    ("\0", False, "utf-8"),
]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_list_is_read_as_people_and_programs_write_it(bulk, tmp_path, monkeypatch, size):
    """Whole to be counted, and in pieces of any size to be asked about, as from a pipe."""
    lists = {f"{number}.txt": each for number, each in enumerate(LISTS)}
    expected = []
    for name, (end, has_last, encoding) in lists.items():
        paths = [f"{name}.jpg", f"é {name}.jpg"]
        text = end.join(paths) + end * has_last
        (tmp_path / name).write_bytes(text.encode(encoding))
        expected += paths
    big_endian = b"\xfe\xff" + "a.jpg\n\né.jpg\n".encode("utf-16-be")  # with a blank line
    (tmp_path / "big.txt").write_bytes(big_endian)
    read = os.read
    monkeypatch.setattr(os, "read", lambda file, most: read(file, min(most, size)))
    # There are no such files.
    bulk(*(f"--from-file={each}" for each in [*lists, "big.txt"]), *OUT, status=1)
    assert paths_of(records(tmp_path / "o.jsonl")) == sorted([*expected, "a.jpg", "é.jpg"])


def test_a_list_that_is_none_is_refused_before_it_fills_the_memory(bulk, tmp_path):
    (tmp_path / "list").write_bytes(b"x" * 2_000_000)
    said = bulk("--from-file", "list", *OUT, status=1)
    assert "a line of the list of paths is over" in said


ODD = [
    b"\xff.jpg",
    rb"\xff.jpg",
    rb"\\xff.jpg",
    b"\\\xff\\xff.jpg",
    rb"a\b.jpg",
    "é.jpg".encode(),
    b"line\nbreak.jpg",
]


@pytest.mark.parametrize("via", ["requests", "batch-api"])
def test_odd_names_lead_back_to_their_files_by_either_way(bulk, tmp_path, via):
    (tmp_path / "odd").mkdir()
    for number, name in enumerate(ODD):
        (tmp_path / "odd" / os.fsdecode(name)).write_bytes(picture(number))
    asked = ("odd", *OUT, "--via", via, "--report", "report.html")
    bulk(*asked)
    assert len({each["path"] for each in records(tmp_path / "o.jsonl")}) == len(ODD)
    assert Page(tmp_path / "report.html").tags["img"] == len(ODD)
    assert f"0 answered, 0 failed, {len(ODD)} done before" in bulk(*asked)


@pytest.mark.parametrize("heif", [True, False])
def test_a_folder_gives_what_can_be_prepared_and_counts_the_rest(bulk, tmp_path, monkeypatch, heif):
    monkeypatch.setattr("moondream_async._images.formats.has_heif", lambda: heif)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.JPG", "b.HEIC", "c.pnm", "d.psd", "e.txt", "none", ".hidden.jpg"):
        (folder / name).touch()
    said = bulk("in", *OUT, status=1)  # all of them are empty
    prepared = ["in/a.JPG", *(["in/b.HEIC"] if heif else []), "in/c.pnm"]
    assert paths_of(records(tmp_path / "o.jsonl")) == prepared
    assert f"{3 if heif else 4} other files were left out" in said
    left_out = {"1 .psd", "1 .txt", "1 without"} | (set() if heif else {"1 .heic"})
    assert set(said.strip().rsplit(": ")[-1].split(", ")) == left_out


CHOSEN = {
    ("--include", "below/*"): 10,
    ("--exclude", "*1.jpg"): 18,
    ("--include", "0000?.jpg", "--exclude", "below/*"): 5,
}


def test_pictures_are_chosen_by_their_names(command, photos):
    for options, count in CHOSEN.items():
        _, said, _ = command("bulk", "photos", *OUT, "--dry-run", *options)
        assert f"{count} pictures to ask about" in said


# -- tables ------------------------------------------------------------------------------

ASKS = ("--ask", "size=How wide is it?", "--ask", "kind=Is it a {kind}?")


def write_table(path, rows):
    """Write rows in the form that the file's name says."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.Table.from_pylist(rows), str(path)
        )


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_gives_pictures_and_its_columns_go_into_questions(
    moondream_simulator, bulk, tmp_path, ending
):
    names = names_below(make_pictures(tmp_path / "photos", 6), tmp_path)
    table = tmp_path / f"in.{ending}"
    rows = [
        {"picture": name, "kind": f"{number} cat", "id": str(number)}
        for number, name in enumerate(names)
    ]
    write_table(table, rows)
    for said in ("6 answered, 0 failed", "6 done before"):
        assert said in bulk(table.name, "-o", "out.csv", *ASKS)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(row["size"] and row["kind"] and row["row.kind"] and row["id"] for row in rows)
    asked = [each.body["question"] for each in moondream_simulator.requests]
    expected = ["How wide is it?"] * 6 + [f"Is it a {number} cat?" for number in range(6)]
    assert sorted(asked) == sorted(expected)


@pytest.mark.parametrize("output", ["o.csv", "o.parquet"])
def test_a_tables_columns_stay_what_they_are_whatever_they_are_called(
    bulk, photos, tmp_path, output
):
    theirs = {name: f"their {name}" for name in ("length", "metrics", "file", "row", "model")}
    ours = {name: f"their {name}" for name in ("time", "size", "answer")}
    row = {"path": "photos/00000.jpg", **theirs, **ours}
    write_table(tmp_path / "in.csv", [row])
    bulk("in.csv", "-o", output)
    if output == "o.csv":
        with (tmp_path / output).open(newline="") as file:
            (written,) = csv.DictReader(file)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        (written,) = parquet.read_table(tmp_path / output).to_pylist()
    expected = theirs | {f"row.{name}": value for name, value in ours.items()}
    assert {name: value for name, value in written.items() if "their" in str(value)} == expected
    assert written["caption"]
    assert int(written["size"]) == (photos / "00000.jpg").stat().st_size


@pytest.mark.parametrize("via", ["requests", "batch-api"])
def test_a_table_in_an_old_encoding_loses_no_row(bulk, photos, tmp_path, via):
    (tmp_path / "in.csv").write_bytes(b"path,kind\nphotos/00000.jpg,caf\xe9\n")
    for said in ("1 answered, 0 failed", "1 done before"):
        assert said in bulk("in.csv", "-o", "o.csv", "--via", via)
    (line,) = records(tmp_path / "o.csv.jsonl")
    assert line["row"] == {"kind": "caf\ufffd"}


NOT_UTF8 = {  # tables, and why a row is not asked about
    "in.csv": (b"path,kind\n%b,cat\n%b,caf\xe9\n", "row 2 has no UTF-8 in column 'kind'"),
    "in.tsv": (b"path\tkind\n%b\tcat\n%b\tcaf\xe9\n", "row 2 has no UTF-8 in column 'kind'"),
    "in.jsonl": (
        b'{"path": "%b", "kind": "cat"}\n{"path": "%b", "kind": "half \\ud83d"}\n',
        "row 2 has no UTF-8 in column 'kind'",
    ),
    "head.csv": (
        b"path,k\xefnd\n%b,cat\n%b,cat\n",
        "no column 'kind', and its header is not UTF-8",
    ),
    "path.jsonl": (
        b'{"path": "%b", "kind": "cat"}\n{"path": "\\ud83d%b", "kind": "cat"}\n',
        "row 2 names no picture in path",
    ),
}


@pytest.mark.parametrize("table", NOT_UTF8)
def test_a_row_that_is_not_utf8_fails_alone_and_is_named(
    moondream_simulator, bulk, photos, tmp_path, table
):
    text, why = NOT_UTF8[table]
    (tmp_path / table).write_bytes(text % (b"photos/00000.jpg", b"photos/00002.jpg"))
    bulk(table, *OUT, *ASKS, "--report", "o.html", status=1)
    failed = [line["error"]["message"] for line in records(tmp_path / "o.jsonl") if "error" in line]
    assert why in failed[-1]
    assert "codec" not in failed[-1]
    assert len(failed) == (2 if table == "head.csv" else 1)
    assert len(moondream_simulator.requests) == 2 * (2 - len(failed))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])  # CSV has no null
def test_a_row_without_a_value_that_is_asked_about_fails_alone_and_unasked(
    moondream_simulator, bulk, photos, tmp_path, ending
):
    rows = [{"path": name, "kind": "cat"} for name in names_below(photos, tmp_path)[:3]]
    rows[1]["kind"] = None
    write_table(tmp_path / f"in.{ending}", rows)
    said = bulk(f"in.{ending}", *OUT, "--ask", "kind=Is it a {kind}?", status=1)
    assert "2 answered, 1 failed" in said
    (failed,) = [line for line in records(tmp_path / "o.jsonl") if "error" in line]
    assert f"in.{ending}: row 2 has nothing in column 'kind'" in failed["error"]["message"]
    assert len(moondream_simulator.requests) == 2


def test_bytes_in_a_parquet_table_are_text_where_they_are_utf8(
    moondream_simulator, bulk, photos, tmp_path
):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"path": "photos/00000.jpg", "kind": "caf\xe9".encode()}]
    rows.append({"path": "photos/00002.jpg", "kind": b"caf\xe9"})
    write_table(tmp_path / "in.parquet", rows)
    bulk("in.parquet", *OUT, "--ask", "kind=Is it a {kind}?", status=1)
    assert [each.body["question"] for each in moondream_simulator.requests] == ["Is it a caf\xe9?"]
    (failed,) = [line for line in records(tmp_path / "o.jsonl") if "error" in line]
    assert "in.parquet: row 2 has no UTF-8 in column 'kind'" in failed["error"]["message"]

    kind = pyarrow.array([b"cat", b"caf\xe9"], pyarrow.binary())
    kind = pyarrow.Array.from_buffers(pyarrow.string(), 2, kind.buffers())
    columns = {"path": ["photos/00000.jpg", "photos/00002.jpg"], "kind": kind}
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table(columns), str(tmp_path / "bad.parquet")
    )
    said = bulk("bad.parquet", *OUT, status=1)
    assert "bad.parquet: column 'kind' can't be read after row 0: 'utf-8' codec" in said


UNREADABLE = {
    "in.jsonl": (b'{"path": "a.jpg"}\n{"path": "caf\xe9.jpg"}\n', "line 2: it is not UTF-8: save"),
    "cut.jsonl": (b'{"path": "a.jpg"}\n{"path": ', "line 2, column 10: no JSON object: Expecting"),
    "list.jsonl": (b"[]\n", "line 1: no JSON object"),
    "in.csv": ("path\na.jpg\n".encode("utf-16"), "and its header is not UTF-8: save it as UTF-8"),
}


@pytest.mark.parametrize("table", UNREADABLE)
def test_a_table_that_cannot_be_read_is_told_with_its_line(bulk, tmp_path, table):
    text, why = UNREADABLE[table]
    (tmp_path / table).write_bytes(text)
    said = bulk(table, *OUT, status=1)
    assert table in said
    assert why in said


@pytest.mark.parametrize("asked", [(), ASKS, ("--via", "batch-api")], ids=["", "asks", "batch"])
def test_a_line_that_is_no_json_costs_no_answer_that_came(
    moondream_simulator, bulk, tmp_path, asked
):
    names = names_below(make_pictures(tmp_path / "photos", 70), tmp_path)
    rows = [json.dumps({"path": name, "kind": "cat"}) for name in names]
    table = tmp_path / "in.jsonl"
    table.write_text("\n".join([*rows, "{oops"]))
    assert "in.jsonl, line 71, column 2: no JSON object" in bulk("in.jsonl", *OUT, *asked, status=1)
    asked_before = [each for each in moondream_simulator.requests if each.method == "POST"]
    lines = records(tmp_path / "o.jsonl")
    assert len(asked_before) == len(lines) * (2 if asked == ASKS else 1)
    table.write_text("\n".join(rows))
    done = f"{70 - len(lines)} answered, 0 failed"
    assert done in bulk("in.jsonl", *OUT, *asked)
    assert len(records(tmp_path / "o.jsonl")) == 70


@pytest.mark.parametrize("via", ["requests", "batch-api"])
def test_times_to_the_nanosecond_as_pandas_writes_them_lose_no_row(bulk, photos, tmp_path, via):
    pyarrow = pytest.importorskip("pyarrow")
    day = 86_400_000_000_000
    columns = {
        "path": pyarrow.array(["photos/00000.jpg"]),
        "at": pyarrow.array([day + 1], pyarrow.timestamp("ns")),
        "here": pyarrow.array([day + 1], pyarrow.timestamp("ns", "UTC")),
        "for": pyarrow.array([1_500_000_001], pyarrow.duration("ns")),
        "each": pyarrow.array([[1, 2]]),
    }
    table = str(tmp_path / "in.parquet")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), table)
    for said in ("1 answered, 0 failed", "1 done before"):
        assert said in bulk("in.parquet", *OUT, "--via", via)
    (line,) = records(tmp_path / "o.jsonl")
    times = {"at": "1970-01-02T00:00:00", "here": "1970-01-02T00:00:00Z", "for": "PT1.5S"}
    assert line["row"] == {**times, "each": [1, 2]}


@pytest.mark.parametrize("source", ["photos", "in.csv"])
def test_braces_that_name_no_column_are_text(moondream_simulator, bulk, photos, tmp_path, source):
    rows = [{"path": name} for name in names_below(photos, tmp_path)]
    write_table(tmp_path / "in.csv", rows)
    texts = ['Answer as {"a": 1}', "Answer {}", "Only {in one word}"]
    for text in texts:
        bulk(source, *OUT, "--skill", "query", "--question", text, "--limit", 1)
    assert [each.body["question"] for each in moondream_simulator.requests] == texts


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_row_without_a_picture_fails_alone(moondream_simulator, bulk, photos, tmp_path, ending):
    rows = [{"picture": name, "kind": "cat"} for name in names_below(photos, tmp_path)[:3]]
    rows[1:1] = [{"picture": "", "kind": "blank"}, {"picture": None, "kind": "none"}]
    if ending == "jsonl":
        rows += [{"kind": "a key less"}, {"picture": 5, "kind": "a number"}]
    table, bad = f"in.{ending}", len(rows) - 3
    write_table(tmp_path / table, rows)
    for done in (f"3 answered, {bad} failed", f"0 answered, {bad} failed, 3 done before"):
        said = bulk(table, *OUT, "--report", "o.html", "--include", "*.jpg", *ASKS, status=1)
        assert done in said
        assert "names no picture in picture" in said
    failed = [line for line in records(tmp_path / "o.jsonl") if "error" in line]
    assert len(failed) == bad
    assert [line["path"] for line in failed[:2]] == [f"{table}#row=2", f"{table}#row=3"]
    assert len(moondream_simulator.requests) == 6


# -- addresses ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["zip", "member", "http", "table of http"])
def test_pictures_elsewhere_are_read_when_their_turn_comes(bulk, photos, tmp_path, way):
    pytest.importorskip("fsspec")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for path in photos.rglob("*.jpg"):
            archive.write(path, path.relative_to(photos))
        archive.writestr("notes.txt", "none")
    with serving_pages(web.static("/photos", photos)) as origin:
        address = f"{origin}/photos/00000.jpg"
        source, count = {
            "zip": ("p.zip", 20),
            "member": (f"zip://below/00001.jpg::{tmp_path}/p.zip", 1),
            "http": (address, 1),
            "table of http": ("in.csv", 1),
        }[way]
        write_table(tmp_path / "in.csv", [{"url": address}])
        allowed = ("--allow-network", "127.0.0.0/8") if "http" in way else ()
        if allowed:  # whoever wrote the table is not let into this network
            assert "is not on the public internet" in bulk(source, *OUT, status=1)
        for said in (f"{count} answered, 0 failed", f"{count} done before"):
            assert said in bulk(source, *OUT, *allowed)
        bulk(source, "-o", "texts/", *allowed)
    assert len(list((tmp_path / "texts").rglob("*.txt"))) == count


def test_a_file_that_is_no_zip_is_named_and_the_others_are_asked_about(bulk, photos, tmp_path):
    pytest.importorskip("fsspec")
    (tmp_path / "bad.zip").write_text("no")
    said = bulk("bad.zip", photos / "00000.jpg", *OUT, status=1)
    assert "Can't list bad.zip: File is not a zip file" in said
    assert "1 answered" in said


def test_a_file_system_of_fsspec_is_listed_folder_by_folder(command, bulk, tmp_path, memory):
    for number, name in enumerate(("a.jpg", "b/c.png", "b/notes.txt", "b/.hidden.jpg")):
        memory.pipe(f"/set/{name}", picture(number))
    memory.pipe("/set/c.jpg", bytes(500_000))
    _, said, _ = command("bulk", "memory://set", *OUT, "--dry-run")
    assert "3 pictures to ask about, 0.5 MB, 3 requests" in said
    memory.rm("/set/c.jpg")
    assert "1 other file was left out: 1 .txt" in bulk("memory://set", *OUT)
    assert "1 answered" in bulk("memory://set/*.jpg", "-o", "texts/")
    expected = ["memory:///set/a.jpg", "memory:///set/b/c.png"]
    assert paths_of(records(tmp_path / "o.jsonl")) == expected
    assert (tmp_path / "texts/a.txt").exists()


@pytest.mark.parametrize(
    "address", ["zip://a.jpg::http://127.0.0.1/p.zip", "simplecache::HTTP://10.0.0.1/a.jpg"]
)
def test_no_chain_goes_around_the_guard_of_the_web(bulk, tmp_path, address):
    pytest.importorskip("fsspec")
    write_table(tmp_path / "in.csv", [{"path": address}])
    assert "on the web is not read" in bulk("in.csv", *OUT, status=1)


@pytest.mark.parametrize(
    ("source", "extra"),
    [("s3://a/b.jpg", "remote"), ("in.parquet", "parquet"), ("a.tar", "webdataset")],
)
def test_an_extra_that_is_missing_is_named(bulk, tmp_path, monkeypatch, source, extra):
    for name in ("fsspec.core", "pyarrow", "pyarrow.parquet", "webdataset"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "in.parquet").touch()
    assert f"pip install 'moondream-async[{extra}]'" in bulk(source, *OUT, status=1)
