"""Pictures at addresses: ``s3://``, ``gs://``, ``https://``, and members of zip and tar files.

fsspec lists and reads them, but for the web: a table from a stranger may name a server inside
this network, so web addresses are fetched as by `fetch_image`, which refuses such servers.
"""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import threading
import weakref
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, BinaryIO, cast

from moondream_async._images import can_prepare
from moondream_async._images.inputs import MAX_FILE_BYTES
from moondream_async._transport.addresses import Network
from moondream_async._transport.fetch import fetch_bytes, networks_of
from moondream_async.errors import MissingExtraError, MoondreamError, RequestError

_SECONDS = 60.0  # for a picture of the web
_WEB = ("http", "https")

_UNPACK: dict[str, Any] = {"gz": gzip.open, "tgz": gzip.open, "bz2": bz2.open, "xz": lzma.open}

_networks: Sequence[Network] = ()


def allow_networks(names: Sequence[str]) -> None:
    """Let this process fetch pictures from these networks, besides the public internet."""
    global _networks  # noqa: PLW0603 - a command is a process; a path alone has to do
    _networks = networks_of(names)


def is_remote(name: str) -> bool:
    """Tell whether a name is an address, or a zip file, which stands for its members.

    >>> is_remote("s3://photos/a.jpg"), is_remote("a.zip"), is_remote("a.jpg")
    (True, True, False)
    """
    return "://" in name or name.lower().endswith(".zip")


def find_remote(name: str, left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield the address of each picture that a name means, and its path within that name.

    Other files in a folder are counted in `left_out`, by the end of their names.
    """
    if _is_web(name):
        yield name, name.partition("?")[0].rpartition("/")[2]
        return
    address = f"zip://::{name}" if "://" not in name else name
    files, root = _open(address)
    first, chained, rest = address.partition("::")
    protocol = first.partition("://")[0]

    def whole(path: str) -> str:
        own = path if path.startswith(f"{protocol}://") else f"{protocol}://{path}"
        return f"{own}{chained}{rest}"

    if any(each in root for each in "*[") and not files.exists(root):
        for path in files.glob(root):
            yield whole(path), path.rpartition("/")[2]
    elif can_prepare(root) or not files.isdir(root):
        yield address, root.rpartition("/")[2]
    else:
        top = len(str(root).rstrip("/"))
        for folder, _, names in files.walk(root):
            for each in names:
                if each.startswith("."):
                    continue
                if can_prepare(each):
                    path = f"{folder.rstrip('/')}/{each}" if folder else each
                    yield whole(path), path[top:].lstrip("/")
                else:
                    left_out[f".{each.rpartition('.')[2].lower()}" if "." in each else ""] += 1


def read_remote(address: str) -> bytes:
    """Return the bytes of a picture; OSError where it can't be read, or is too large."""
    if _is_web(address):
        fetched = fetch_bytes(address, max_bytes=MAX_FILE_BYTES, networks=_networks)
        try:
            return asyncio.run(asyncio.wait_for(fetched, _SECONDS))
        except TimeoutError:
            raise OSError(f"it was not fetched within {_SECONDS:g} seconds") from None
        except MoondreamError as error:
            raise OSError(str(error)) from error
    member, of_tar, archive = address.removeprefix("tar://").partition("::")
    try:
        if of_tar and address.startswith("tar://"):
            data = _read_member(archive, member)
        else:
            with open_remote(address) as file:
                data = file.read(MAX_FILE_BYTES + 1)
    except OSError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise OSError(f"it has more than {MAX_FILE_BYTES:,} bytes")
    return data


def size_of_remote(address: str) -> int:
    """Return the size of a picture where the file system has it at hand, else 0."""
    try:
        files, path = _open(address)
        return int(files.size(path) or 0)
    except Exception:  # noqa: BLE001 - each file system has errors of its own
        return 0


@contextlib.contextmanager
def open_remote(address: str) -> Iterator[BinaryIO]:
    """Open a file for reading; each file system raises errors of its own."""
    files, path = _open(address)  # `files` closes what it opened when it is released
    with files.open(path, "rb") as file:
        yield file


def _read_member(archive: str, name: str) -> bytes:
    """Return a member's bytes, one more than the limit if there are too many."""
    version = 0 if "://" in archive else os.stat(archive).st_mtime_ns  # noqa: PTH116 - a string
    with _one_at_a_time:
        tar, members = _tar(archive, version)
        member = members.get(name)
        if member is None or not member.isreg():
            raise FileNotFoundError("there is no such file in the archive")
        return cast("BinaryIO", tar.extractfile(member)).read(MAX_FILE_BYTES + 1)


_one_at_a_time = threading.Lock()  # threads would move each other's position in the file


@lru_cache(maxsize=2)
def _tar(name: str, _version: int) -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
    """Return a tar file and its members by name; fsspec would search all of it for each.

    A compressed file, or one on another machine, is first copied to a temporary file.
    """
    unpack = _UNPACK.get(name.lower().rpartition(".")[2])
    copied = unpack is not None or "://" in name
    with contextlib.ExitStack() as stack:
        file: Any = tempfile.TemporaryFile() if copied else open(name, "rb")  # noqa: PTH123, SIM115
        stack.enter_context(file)
        if copied:
            with (
                open_remote(name) if "://" in name else open(name, "rb") as packed,  # noqa: PTH123
                unpack(packed) if unpack else packed as source,
            ):
                shutil.copyfileobj(source, file)
            file.seek(0)
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - its file is closed
        members = {each.name: each for each in tar}
        weakref.finalize(tar, stack.pop_all().close)
    return tar, members


def _open(address: str) -> tuple[Any, str]:
    if any(map(_is_web, address.split("::"))):
        raise RequestError(f"{address}: an archive on the web is not read; fetch it first")
    try:
        import fsspec.core  # noqa: PLC0415 - an extra

        files, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise MissingExtraError(
            f"{address.partition('://')[0]}:// needs fsspec, and a library for that kind: "
            f"pip install 'moondream-async[remote]' ({error})"
        ) from None
    except zipfile.BadZipFile as error:
        raise OSError(str(error)) from error
    return files, path


def _is_web(address: str) -> bool:
    return address.partition("://")[0].strip().lower() in _WEB
