"""WebDataset's shards: tar files whose members are samples, as ``cat/1.jpg`` beside ``cat/1.txt``.

Shards are read from beginning to end, a sample at a time, and so may be compressed, or on
another machine. The library `webdataset` groups members into samples, and writes them.
"""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError, ReadError  # type: ignore[attr-defined]
from typing import Any, Self, cast

import msgspec

from moondream_async._images import can_prepare
from moondream_async._images.inputs import MAX_FILE_BYTES
from moondream_async.cli._files import replacing

from .lines import Records, answer_of, encode
from .remote import open_remote
from .sources import Contents, Found, needs, picture_of

_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_TEXTS = ("txt", "text", "transcript", "caption", "cls", "cls2", "class", "count", "index", "id")
"""Members that become columns, besides ``json``: the library decodes them as texts."""
_LONGEST = 1 << 20  # bytes of such a member
_SAMPLES, _BYTES = 10_000, 1_000_000_000  # in a shard of ours
_NUMBER = re.compile(r"%0?\d*d")


def is_shard(name: str) -> bool:
    """Tell whether a path or an address names a shard.

    >>> is_shard("s3://set/{000..009}.tar"), is_shard("tar://a.jpg::a.tar"), is_shard("a.jpg")
    (True, False, False)
    """
    return name.lower().endswith(_ENDINGS) and "::" not in name


def check_shards() -> None:
    """Refuse, before anything is asked, where the library for shards is not installed."""
    needs("webdataset", "Shards need webdataset", "webdataset")


def expand(name: str) -> list[str]:
    """Return the shards that a name with braces means; a file of that very name comes first.

    >>> expand("{08..10}.tar")
    ['08.tar', '09.tar', '10.tar']
    """
    if "{" not in name or os.path.lexists(name):
        return [name]
    check_shards()
    from braceexpand import braceexpand  # noqa: PLC0415 - an extra

    try:
        return list(braceexpand(name))
    except ValueError:  # a brace without another
        return [name]


def find_samples(
    shard: str,
    picture: str | None,
    left_out: Counter[str],
    complain: Callable[[str], object],
) -> Iterator[Found]:
    """Yield the samples of a shard, each with its picture read and its texts as its row.

    The row has ``__key__``, the keys of ``.json``, and each text by the end of its name. Of
    several pictures in a sample, the first is taken, or the one with the end `picture`.
    Samples without a picture are counted in `left_out`; OSError ends a damaged shard.
    """
    check_shards()
    from webdataset.tariterators import group_by_keys  # noqa: PLC0415 - an extra

    def skipped(error: Exception) -> bool:
        complain(f"{shard}: {error.args[0]}" if error.args else repr(error))
        return True

    stem = re.split(r"[/\\]", shard)[-1].partition(".")[0]
    try:
        for sample in group_by_keys(_members(shard, picture), handler=skipped):
            key = sample.pop("__key__")
            del sample["__url__"]
            ends = [each for each in sample if can_prepare(f"a.{each}")]
            end = picture if picture in sample else None if picture else next(iter(ends), None)
            if end is None:
                left_out[f".{next(iter(sample))}"] += 1
                continue
            name, data = sample.pop(end)
            yield Found(
                f"tar://{name}::{shard}",
                f"{stem}/{key}.{end}",
                {"__key__": key, **_columns(sample)},
                data=data,
                # A picture that was too large to be read is refused when its turn comes.
                contents=data and Contents.of(data),
            )
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise OSError(str(error)) from error
    except OSError:
        raise
    except Exception as error:  # each file system, and each packing, has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


def _members(shard: str, picture: str | None) -> Iterator[dict[str, Any]]:
    with (
        open_remote(shard) if "://" in shard else Path(shard).open("rb") as file,
        tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as archive,
    ):
        for member in archive:
            archive.members = []  # type: ignore[attr-defined] # else tarfile keeps them all
            if not member.isreg() or member.name.startswith("__"):
                continue
            end = member.name.rpartition("/")[2].partition(".")[2].lower()
            is_text = end in (*_TEXTS, "json")
            wanted = can_prepare(member.name) or end == picture or is_text
            data = None
            if wanted and member.size <= (_LONGEST if is_text else MAX_FILE_BYTES):
                data = cast("Any", archive.extractfile(member)).read()
            yield {"fname": member.name, "data": (member.name, data), "__url__": shard}


class _Member(tarfile.TarInfo):
    """A member of an archive; a cut archive raises, where tarfile would take it for whole."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(f"it is damaged, or not all of it is there ({error})") from error


def _columns(sample: dict[str, tuple[str, bytes | None]]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for end, (_, data) in sample.items():
        if data is None:
            continue
        if end == "json":
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                columns |= msgspec.json.decode(data, type=dict[str, Any])
        elif end in _TEXTS:
            columns[end] = data.decode("utf-8", "replace").strip()
    return columns


# -- writing -----------------------------------------------------------------------------


def shard_name(pattern: str, number: int) -> str:
    """Return the name of a shard; a pattern without a number means one only.

    >>> shard_name("out/%06d.tar", 7), shard_name("out.tar", 0)
    ('out/000007.tar', 'out.tar')
    """
    return _NUMBER.sub(lambda found: found[0] % number, pattern, count=1)


def is_shard_of(path: str, pattern: str) -> bool:
    """Tell whether a path is that of a shard which `shard_name` names.

    >>> is_shard_of("out/000007.tar", "out/%06d.tar"), is_shard_of("a.tar", "out.tar")
    (True, False)
    """
    name = _NUMBER.sub("\0", pattern, count=1)
    return re.fullmatch(re.escape(name).replace("\0", r"\d+"), path) is not None


def write_shards(records: Records, pattern: str) -> None:
    """Write shards of samples: the picture as it is, its text, and its line as JSON.

    Each picture is read again; pictures that failed, or have changed since, are left out.
    """
    check_shards()
    from webdataset.writer import TarWriter  # noqa: PLC0415 - an extra

    samples = _samples(records)
    sample, several = next(samples, None), _NUMBER.search(pattern) is not None
    for number in count():
        name = shard_name(pattern, number)
        if number and sample is None:
            break
        written = size = 0
        # Without a time in the shard: the same records make the same file.
        with (
            replacing(name) as file,
            TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer,
        ):
            while sample and not (several and (written >= _SAMPLES or size >= _BYTES)):
                size += writer.write(sample)
                written += 1
                sample = next(samples, None)
    while several and os.path.exists(name):  # noqa: PTH110 - a shard of a longer run before
        os.unlink(name)  # noqa: PTH108 - likewise
        number += 1
        name = shard_name(pattern, number)


def _samples(records: Records) -> Iterator[dict[str, Any]]:
    seen: Counter[int] = Counter()  # of hashes, which are smaller than keys
    for record in records():
        data = None if record.get("error") else picture_of(record)
        if data is None:
            continue
        key, end = _key_and_end(record)
        seen[hash(key)] += 1
        number = seen[hash(key)]
        if number > 1:  # a picture of another folder, or of another shard, has this key
            while hash(f"{key}-{number}") in seen:
                number += 1
            key = f"{key}-{number}"
            seen[hash(key)] += 1
        own = {name: record[name] for name in record if name not in ("file", "metrics")}
        sample = {"__key__": key, end: data, "json": encode(own)}
        text = answer_of(record)
        yield sample if text is None else {**sample, "txt": text.encode()}


def _key_and_end(record: dict[str, Any]) -> tuple[str, str]:
    """Return the key of a picture's sample, and the end of the picture's name.

    >>> _key_and_end({"path": "/photos/cats/1.v2.JPG"})
    ('photos/cats/1_v2', 'jpg')
    >>> _key_and_end({"path": "tar://cats/1.png::a.tar", "row": {"__key__": "cats/1"}})
    ('cats/1', 'png')
    """
    path = record["path"]
    if "://" in path:
        path = path.partition("://")[2].partition("::")[0].partition("?")[0]
    stem, end = os.path.splitext(path)  # noqa: PTH122 - a string, as it stands in lines
    own = record.get("row", {}).get("__key__")
    parts = re.split(r"[/\\]", own if isinstance(own, str) else stem)
    parts = [each for each in parts if each not in ("", ".", "..")] or ["-"]
    # A dot would end the key, and readers skip names that begin with two underscores.
    key = "/".join([*parts[:-1], parts[-1].replace(".", "_")])
    return key.removeprefix("_") if key.startswith("__") else key, end[1:].lower() or "jpg"
