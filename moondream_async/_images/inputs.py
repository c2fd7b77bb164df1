"""The bytes of a caller's picture: of a path, a file or a data URI. Sizes are checked first."""

from __future__ import annotations

import binascii
import os
import stat
import sys
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol, TypeAlias, TypeGuard

from moondream_async.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FILE_BYTES: Final = 256_000_000
"""Larger files are refused unread: the largest files of cameras have half of this."""

_READ_BYTES: Final = 1 << 26  # in one call; some systems read no more than 2 GiB at once
_STEP: Final = 1 << 18  # bytes for one call that holds the GIL: about a millisecond
_WHITE_SPACE: Final = b" \t\r\n\f\v"
_BASE64: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


class SupportsArrayInterface(Protocol):
    """A numpy array, or another object with its interface."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


ImageSource: TypeAlias = (
    "str | os.PathLike[str] | os.PathLike[bytes] | bytes | bytearray | memoryview | BinaryIO"
    " | Image | SupportsArrayInterface"
)
"""The forms of a picture that `encode_image` takes, beside an `EncodedImage`."""


def is_pillow(image: object) -> TypeGuard[Image]:
    """Tell whether this is a Pillow image, without loading Pillow, which made it if so."""
    # While another thread loads the module, its class may still be missing.
    kind = getattr(sys.modules.get("PIL.Image"), "Image", None)
    return kind is not None and isinstance(image, kind)


def is_array(image: object) -> TypeGuard[SupportsArrayInterface]:
    """Tell whether this is a numpy array, without loading numpy."""
    return hasattr(type(image), "__array_interface__")


def describe(image: object) -> str:
    """Return the picture's name for messages: its path, or the type of the value."""
    if isinstance(image, str):
        return "the data URI" if _is_data_uri(image) else _shorten(image)
    if isinstance(image, (bytes, bytearray)):
        return f"the picture ({len(image)} bytes)"
    name: object
    try:
        if isinstance(image, os.PathLike):
            name = os.fsdecode(image)
        else:
            name = getattr(image, "name", None) or getattr(image, "filename", None)
    except Exception:  # noqa: BLE001 - raised by a caller's own class
        name = None
    if isinstance(name, str):
        return _shorten(name)
    return f"the {type(image).__name__}"


def _shorten(name: str) -> str:
    """Quote a name; shorten a long one, as when a file's contents are passed as a path."""
    return repr(name) if len(name) <= 200 else f"{name[:100]!r}... ({len(name)} characters)"


def read(image: Any, most: int = MAX_FILE_BYTES) -> bytes:
    """Return the bytes of a path, a file, a data URI or a buffer.

    Raises:
        ImageError: There are none, they can't be read, or are more than `MAX_FILE_BYTES`;
            or the file at a path has more than `most`.
    """
    if isinstance(image, str) and _is_address(image):
        raise ImageError(
            "is an address, and this client fetches none by itself: "
            "`await moondream_async.fetch_image(url)` gives a picture to pass here"
        )
    if isinstance(image, (bytes, bytearray, memoryview)):
        data = _from_buffer(image)
    elif isinstance(image, str) and _is_data_uri(image):
        data = _from_data_uri(image)
    elif isinstance(image, (str, os.PathLike)):
        data = _from_path(image, most)
    elif callable(getattr(image, "read", None)):
        data = _from_file(image)
    else:
        raise ImageError(
            f"is no picture: expected a path, bytes, a binary file, a Pillow image, "
            f"a numpy array or a data URI, not {type(image).__name__}"
        )
    if not data:
        raise ImageError("is empty")
    return data


def _check_size(size: int, most: int = MAX_FILE_BYTES) -> None:
    if size > most:
        raise ImageError(f"is too large: {size:,} bytes, and {most:,} are the limit")


def _from_buffer(buffer: bytes | bytearray | memoryview) -> bytes:
    try:
        _check_size(buffer.nbytes if isinstance(buffer, memoryview) else len(buffer))
        return bytes(buffer)  # bytes are not copied
    except ValueError as error:  # a memoryview that was released
        raise ImageError(f"can't be read: {error}") from error


def _from_path(path: str | os.PathLike[Any], most: int) -> bytes:
    # O_NONBLOCK: to open a FIFO without a writer would block for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        number = os.open(path, flags)  # not `open`, whose system calls each release and
        try:  # take the GIL
            return _from_regular_file(number, most)
        finally:
            os.close(number)
    except ImageError:
        raise  # it is a ValueError too
    except FileNotFoundError as error:
        raise ImageError("does not exist") from error
    except IsADirectoryError as error:
        raise ImageError("is a directory") from error
    except PermissionError as error:
        raise ImageError("may not be read: permission denied") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"can't be opened: {reason}") from error


def _from_regular_file(number: int, most: int) -> bytes:
    status = os.fstat(number)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("is not a regular file")
    _check_size(status.st_size, most)
    pieces: list[bytes] = []
    left = status.st_size  # no more is read, should the file grow meanwhile
    while left and (piece := os.read(number, min(left, _READ_BYTES))):
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _from_file(file: Any) -> bytes:
    """Read a file from its position to its end; leave it open."""
    pieces: list[bytes] = []
    size = 0
    while True:
        try:
            piece = file.read(_STEP)
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            raise ImageError(f"can't be read: {error}") from error
        if not isinstance(piece, (bytes, bytearray, memoryview)):
            if hasattr(piece, "__await__"):
                if hasattr(piece, "close"):
                    piece.close()  # a coroutine that is not awaited would warn
                raise ImageError("is an async file: pass what `await file.read()` gives")
            hint = "; open it with mode 'rb'" if isinstance(piece, str) else ""
            raise ImageError(f"gave {type(piece).__name__} instead of bytes{hint}")
        if not piece:
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.append(bytes(piece))
        size += len(piece)
        _check_size(size)


def is_path(image: object) -> TypeGuard[str | os.PathLike[Any]]:
    """Tell a path from other strings and all other pictures."""
    if isinstance(image, str):
        return not _is_address(image) and not _is_data_uri(image)
    return isinstance(image, os.PathLike)


def _is_address(text: str) -> bool:
    return text[:8].lower().startswith(("http://", "https://"))


def _is_data_uri(text: str) -> bool:
    return text[:5].lower() == "data:"


def _from_data_uri(uri: str) -> bytes:
    """Decode a URI of RFC 2397. Its media type is ignored: the bytes show the format."""
    _check_size(len(uri) // 3)  # a byte takes three characters percent-encoded, fewer in base64
    comma = uri.find(",")
    if comma < 0:
        raise ImageError("is malformed: it has no comma")
    pieces = _unquoted(uri, comma + 1)
    try:
        if uri[max(0, comma - 20) : comma].rstrip().lower().endswith(";base64"):
            pieces = _from_base64(pieces)
        return b"".join(pieces)
    except ValueError as error:  # binascii.Error and UnicodeEncodeError are kinds of it
        raise ImageError(f"is malformed: {error}") from error


def _unquoted(text: str, at: int) -> Iterator[bytes]:
    """Undo percent encoding from `at` on, in steps that never cut an escape."""
    escaped = text.find("%", at) >= 0
    step = 65536 if escaped else _STEP  # each escape takes an object while it is decoded
    while at < len(text):
        end = min(at + step, len(text))
        if escaped and end < len(text) and (cut := text.rfind("%", end - 2, end)) >= 0:
            end = cut
        piece = text[at:end].encode("ascii")
        yield urllib.parse.unquote_to_bytes(piece) if escaped else piece
        at = end


def _from_base64(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Decode base64 that may have white space in it and may lack its padding."""
    rest = b""
    for piece in pieces:
        rest += piece.translate(None, _WHITE_SPACE)
        whole = max(0, len(rest) - 1) // 4 * 4  # the last four may be padded
        yield _decode_base64(rest[:whole])
        rest = rest[whole:]
    yield _decode_base64(rest.rstrip(b"="))


def _decode_base64(text: bytes) -> bytes:
    if text.translate(None, _BASE64):  # binascii skips unknown characters
        raise ValueError("its base64 has other characters in it")
    return binascii.a2b_base64(text + b"=" * (-len(text) % 4))
