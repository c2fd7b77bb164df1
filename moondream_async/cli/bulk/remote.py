"""Pictures that are elsewhere: ``s3://``, ``gs://``, ``https://``, members of a zip file.

All of it is fsspec's work. A folder is listed folder by folder, and a picture is read
when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moondream_async._images.inputs import MAX_FILE_BYTES
from moondream_async.errors import RequestError


def is_remote(name: str) -> bool:
    """Tell whether a name is an address, or a zip file, whose members are meant.

    >>> is_remote("s3://photos/a.jpg"), is_remote("a.zip"), is_remote("a.jpg")
    (True, True, False)
    """
    return "://" in name or name.lower().endswith(".zip")


def find_remote(name: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the address of each picture that a name means, and its path below it.

    Raises:
        RequestError: fsspec, or what it needs for this kind of address, is not installed.
        OSError: It can't be listed.
    """
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
    elif root.lower().endswith(suffixes) or not files.isdir(root):
        yield address, root.rpartition("/")[2]
    else:
        top = len(str(root).rstrip("/"))
        for folder, _, names in files.walk(root):
            for each in names:
                if each.lower().endswith(suffixes) and not each.startswith("."):
                    path = f"{folder.rstrip('/')}/{each}" if folder else each
                    yield whole(path), path[top:].lstrip("/")


def read_remote(address: str) -> bytes:
    """Return the bytes of a picture.

    Raises:
        OSError: It can't be read, or is too large.
    """
    try:
        files, path = _open(address)
        with files.open(path, "rb") as file:
            data: bytes = file.read(MAX_FILE_BYTES + 1)
    except OSError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise OSError(f"it has more than {MAX_FILE_BYTES:,} bytes")
    return data


def _open(address: str) -> tuple[Any, str]:
    try:
        import fsspec.core  # noqa: PLC0415 - an extra

        files, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise RequestError(
            f"{address.partition('://')[0]}:// needs fsspec, and a library for that kind: "
            f"pip install 'moondream-async[remote]' ({error})"
        ) from None
    return files, path
