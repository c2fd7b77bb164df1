"""A text file beside each picture's name, as training tools read them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from moondream_async.cli._files import replacing
from moondream_async.errors import RequestError

from .journal import Journal
from .lines import encode
from .sources import Found

_OWN_FAULT = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ELOOP}
_OWN_FAULT |= {errno.EACCES, errno.EPERM, errno.EILSEQ}
"""What one name can be the reason for; a full or failing disk is everybody's."""

_LONGEST = 1 << 24  # bytes; longer texts are not ours


class TextFolder:
    """A folder with a text file for each picture.

    ``photos/cats/1.jpg``, found in ``photos``, is told of in ``cats/1.txt``. Two pictures
    that would share a file, as ``1.jpg`` and ``1.png``, are the second one's error. A text
    that no run wrote, or that was changed since, stays as it is. With `labels`, they are
    in a folder ``labels``, as of a YOLO data set.
    """

    def __init__(self, folder: str, *, labels: bool = False, overwrite: bool = False) -> None:
        self.kept: dict[Path, None] = {}
        """Texts that people wrote, which stay; in the order in which they were met."""
        self._folder = Path(folder, "labels") if labels else Path(folder)
        self._overwrite = overwrite
        self._owners: dict[int, int] = {}  # hashes, which are smaller than paths

    def claim(self, found: Found, journal: Journal) -> bool | None:
        """Take a picture's text file for it; return whether it is written.

        None is for a text of somebody else's, which is kept.

        Raises:
            RequestError: It is another picture's, or can't be.
        """
        path = self.path(found)
        if self._owners.setdefault(hash(path), hash(found.path)) != hash(found.path):
            raise RequestError(f"{found.name!r}: {path} is the text of another picture")
        try:
            return self._look(found, path, journal)
        except OSError as error:
            raise self._own_failure(found, error) from error

    def path(self, found: Found) -> Path:
        """Return where the text about a picture goes.

        Raises:
            RequestError: That would be outside the folder.
        """
        below = os.path.normpath(os.path.splitext(found.below)[0]).lstrip(os.sep)  # noqa: PTH122
        if Path(below).parts[:1] == (os.pardir,) or Path(below).is_absolute():
            raise RequestError(f"{found.name!r}: its text would be outside {self._folder}")
        return self._folder / f"{below}.txt"

    def write(self, found: Found, text: str, journal: Journal) -> None:
        """Write the text of an answer, unless somebody else has written one meanwhile.

        Raises:
            RequestError: There can be no such file.
            OSError: Nothing can be written there.
        """
        path = self.path(found)
        try:
            if self._look(found, path, journal) is None:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=False) as file:  # there are many; each can be had again
                file.write((text + "\n" if text else "").encode())
        except OSError as error:
            raise self._own_failure(found, error) from error

    def _look(self, found: Found, path: Path, journal: Journal) -> bool | None:
        """Tell whether the text is there and a run's; None if it is somebody else's."""
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

    @staticmethod
    def _own_failure(found: Found, error: OSError) -> Exception:
        if error.errno in _OWN_FAULT:
            return RequestError(f"{found.name!r}: its text can't be written: {error.strerror}")
        return error


def write_classes(folder: str, names: list[str]) -> None:
    """Write ``data.yaml`` of a YOLO data set: what the numbers of classes mean.

    Raises:
        OSError: It can't be written.
    """
    listed = ", ".join(encode(name).decode() for name in names)  # JSON is YAML, too
    with replacing(Path(folder, "data.yaml")) as file:
        file.write(f"nc: {len(names)}\nnames: [{listed}]\n".encode())
