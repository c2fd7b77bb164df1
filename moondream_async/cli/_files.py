# ruff: noqa: PTH105, PTH108, PTH120 - paths are strings here, as they stand in lines
"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from typing import Any

UNSUPPORTED = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOTTY")
    if hasattr(errno, name)
}
"""The errors of a file system that can't lock or flush."""


def flush(descriptor: int) -> bool:
    """Write a file's contents to the disk; False where the file system can't flush."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Any]:
    """Open a new binary file that replaces `path` at the end of the block, in one step.

    After an error in the block, `path` is as it was. The new file gets the old one's
    permissions. Where `path` is a link, its target is replaced; a terminal or a pipe is
    written to directly. With `sync`, the contents are on the disk before the old file goes.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):  # noqa: PTH110, PTH113
        with open(target, "wb") as file:  # noqa: PTH123
            yield file
        return
    beside = os.path.join(os.path.dirname(target), f".{secrets.token_hex(6)}.part")  # noqa: PTH118
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(beside, flags, 0o666)
    except OSError as error:
        error.filename = os.fspath(path)  # as the user named it
        raise
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
            with contextlib.suppress(OSError):
                os.chmod(beside, stat.S_IMODE(os.stat(target).st_mode))  # noqa: PTH101, PTH116
            yield file
            file.flush()
            if sync:
                flush(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
