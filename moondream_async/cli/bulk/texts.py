"""A text file beside each picture's name, as training tools read them."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from moondream_async.cli._files import replacing
from moondream_async.errors import RequestError

from .journal import Journal
from .lines import encode
from .sources import Found

_OWN_FAULT = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ELOOP}
_OWN_FAULT |= {errno.EACCES, errno.EPERM, errno.EILSEQ}
"""Failures for which one name is the reason; a full or failing disk ends the run."""

_LONGEST = 1 << 24  # bytes; no run writes longer texts


class TextFolder:
    """A folder with a text file for each picture.

    The text for ``photos/cats/1.jpg``, found in ``photos``, is ``cats/1.txt``. Where two
    pictures would share a text, as ``1.jpg`` and ``1.png`` would, the second one fails. A
    text that no run wrote, or that was changed since, stays as it is. With `labels`, the
    texts are in a folder ``labels``, as in a YOLO data set.
    """

    def __init__(self, folder: str, *, labels: bool = False, overwrite: bool = False) -> None:
        self.kept: dict[Path, None] = {}
        """Texts that users wrote, which stay; in the order in which they were found."""
        self._folder = Path(folder, "labels") if labels else Path(folder)
        self._overwrite = overwrite
        self._owners: dict[int, int] = {}  # hashes, which are smaller than paths

    def claim(self, found: Found, journal: Journal) -> bool | None:
        """Reserve a picture's text file; return whether its text is already written.

        None is for a text that a user wrote, which is kept.

        Raises:
            RequestError: The file is another picture's text, or can't be written.
        """
        path = self.path(found)
        if self._owners.setdefault(hash(path), hash(found.path)) != hash(found.path):
            raise RequestError(f"{found.name!r}: {path} is the text of another picture")
        with _blamed(found):
            return self._look(found, path, journal)

    def path(self, found: Found) -> Path:
        """Return the path of a picture's text; RequestError where it leads out of the folder."""
        below = os.path.normpath(os.path.splitext(found.below)[0]).lstrip(os.sep)  # noqa: PTH122
        if Path(below).parts[:1] == (os.pardir,) or Path(below).is_absolute():
            raise RequestError(f"{found.name!r}: its text would be outside {self._folder}")
        return self._folder / f"{below}.txt"

    def write(self, found: Found, text: str, journal: Journal) -> None:
        """Write the text of an answer, unless a user has written one meanwhile.

        Raises:
            RequestError: The file's name is the reason for a failure.
            OSError: The disk is full or failing.
        """
        path = self.path(found)
        with _blamed(found):
            if self._look(found, path, journal) is None:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=False) as file:  # the journal has the answer, too
                file.write((text + "\n" if text else "").encode())

    def _look(self, found: Found, path: Path, journal: Journal) -> bool | None:
        """Tell whether a run's text is there; None where the text is a user's."""
        try:
            status = path.lstat()
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(status.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if stat.S_ISREG(status.st_mode) and status.st_size < _LONGEST:
            text = path.read_bytes().decode(errors="replace").removesuffix("\n")
            if (written := journal.wrote(found, text)) is not None:
                return written == "last"
        if self._overwrite:
            return False
        self.kept[path] = None
        return None


@contextlib.contextmanager
def _blamed(found: Found) -> Iterator[None]:
    """Turn an OSError into a RequestError where the name of a picture's text is the reason."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OWN_FAULT:
            raise
        why = f"{found.name!r}: its text can't be written: {error.strerror}"
        raise RequestError(why) from error


def write_classes(folder: str, names: list[str]) -> None:
    """Write ``data.yaml`` of a YOLO data set: the names of its classes."""
    listed = ", ".join(encode(name).decode() for name in names)  # JSON is YAML, too
    with replacing(Path(folder, "data.yaml")) as file:
        file.write(f"nc: {len(names)}\nnames: [{listed}]\n".encode())
