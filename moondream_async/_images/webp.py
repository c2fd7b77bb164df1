"""WebP: cut out the metadata, keep the first picture. RFC 9649."""

from __future__ import annotations

from typing import Final, NamedTuple

from moondream_async.errors import ImageError

from .header import Header, exif_orientation, icc_profile, xmp_orientation

_ICC, _ALPHA, _ANIMATION = 0x20, 0x10, 0x02  # flags in VP8X; the flags of EXIF and XMP are cleared
_MAX_CHUNKS: Final = 10_000  # a still picture has at most six
_CUT_SHORT: Final = "is cut short: a WebP that ends before it says"
_DAMAGED: Final = "is damaged: a WebP whose parts do not fit together"
_TAIL: Final = 8  # bytes taken away; decoders do without the last two or three


class _Chunk(NamedTuple):
    kind: bytes
    body: memoryview
    whole: memoryview
    """The chunk with its head and its padding."""


class _Still(NamedTuple):
    pieces: list[bytes | memoryview]
    size: tuple[int, int]
    alpha: bool
    kind: bytes
    body: memoryview


def parse(data: bytes) -> Header:
    """Walk a WebP file to the end of its container.

    Kept are the first picture, its alpha and its ICC profile. EXIF, XMP, unknown chunks, an
    animation's other frames, reserved bytes, and bytes after the container are cut out. Only
    a decoder can find bytes that hide behind the picture's own. A first frame that is opaque
    and covers the canvas becomes a still picture; another first frame stays an animation of
    one frame, and is not plain. A picture with alpha is not plain either.

    Raises:
        ImageError: The file ends before its picture does, or is no WebP throughout.
    """
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise ImageError(_CUT_SHORT)
    chunks = _chunks(memoryview(data)[12:end])
    first = {chunk.kind: chunk for chunk in reversed(chunks)}
    extended = first.get(b"VP8X")
    flags = 0
    pieces: list[bytes | memoryview] = []
    if extended is None:
        still = _still(chunks[:1])
        canvas = still.size
    else:
        if len(extended.body) != 10:
            raise ImageError(_DAMAGED)
        flags = extended.body[0] & (_ICC | _ALPHA | _ANIMATION)
        canvas = _u24(extended.body, 4) + 1, _u24(extended.body, 7) + 1
        profile = _profile(first) if flags & _ICC else None
        if profile is None:
            flags &= ~_ICC
        else:
            pieces.append(profile)
        still = _first_frame(first) if flags & _ANIMATION else _still(chunks)
        if still.size == canvas and not still.alpha:
            flags &= ~_ANIMATION
    if still.size != canvas and not flags & _ANIMATION:
        raise ImageError(_DAMAGED)
    if flags & _ANIMATION:
        pieces += (first[b"ANIM"].whole, first[b"ANMF"].whole)
    else:
        pieces += still.pieces
    if extended is not None:
        same = bytes(extended.body[:4]) == bytes([flags, 0, 0, 0])  # three bytes are reserved
        head = _riff(b"VP8X", bytes([flags, 0, 0, 0]) + bytes(extended.body[4:]))
        pieces.insert(0, extended.whole if same else head)
    container = _container(pieces)
    unchanged = container == data[:12] and all(isinstance(piece, memoryview) for piece in pieces)
    return Header(
        media_type="image/webp",
        width=canvas[0],
        height=canvas[1],
        kept=[memoryview(data)] if unchanged and end == len(data) else [container, *pieces],
        plain=not still.alpha and not flags & (_ALPHA | _ANIMATION),
        orientation=_orientation(first),
        shortened=lambda: _shortened(still),
    )


def _profile(first: dict[bytes, _Chunk]) -> memoryview | bytes | None:
    """Return the chunk of the ICC profile, cleaned; None if there is no profile."""
    if b"ICCP" not in first:
        return None
    _, body, whole = first[b"ICCP"]
    profile = icc_profile(bytes(body))
    if profile is None or len(profile) == len(body):
        return None if profile is None else _filled(whole, body)
    return _riff(b"ICCP", profile)


def _orientation(first: dict[bytes, _Chunk]) -> int:
    """Return the orientation in EXIF, else in XMP, else 1."""
    found = exif_orientation(first[b"EXIF"].body) if b"EXIF" in first else 0
    if not found and b"XMP " in first:
        found = xmp_orientation(bytes(first[b"XMP "].body))
    return found or 1


def _riff(kind: bytes, body: bytes) -> bytes:
    return kind + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) & 1)


def _shortened(still: _Still) -> bytes:
    chunk = _riff(still.kind, bytes(still.body[:-_TAIL]))
    return _container([chunk]) + chunk


def _container(pieces: list[bytes | memoryview]) -> bytes:
    size = 4 + sum(map(len, pieces))
    return b"RIFF" + size.to_bytes(4, "little") + b"WEBP"


def _chunks(view: memoryview) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    at = 0
    while at + 8 <= len(view):
        if len(chunks) == _MAX_CHUNKS:
            raise ImageError(f"is no ordinary WebP: it has more than {_MAX_CHUNKS:,} chunks")
        body = at + 8
        end = body + int.from_bytes(view[at + 4 : body], "little")
        if end > len(view):
            raise ImageError(_CUT_SHORT)
        after = end + (end - body & 1)  # the byte in between fills up
        chunks.append(_Chunk(bytes(view[at : at + 4]), view[body:end], view[at:after]))
        at = after
    return chunks


def _first_frame(first: dict[bytes, _Chunk]) -> _Still:
    """Return an animation's first picture; with size 0 by 0 if it is not at the upper left."""
    if b"ANIM" not in first or b"ANMF" not in first or len(first[b"ANMF"].body) < 16:
        raise ImageError("is an animated WebP without a picture in it")
    body = first[b"ANMF"].body
    still = _still(_chunks(body[16:]))
    if still.size != (_u24(body, 6) + 1, _u24(body, 9) + 1):
        raise ImageError(_DAMAGED)
    return still if (_u24(body, 0), _u24(body, 3)) == (0, 0) else still._replace(size=(0, 0))


def _still(chunks: list[_Chunk]) -> _Still:
    """Return the picture among `chunks`, with its alpha."""
    pieces: list[bytes | memoryview] = []
    for kind, body, whole in chunks:
        if kind == b"ALPH":
            pieces = [whole]
        elif kind == b"VP8 " and len(body) > 10 and bytes(body[3:6]) == b"\x9d\x01\x2a":
            tag = _u24(body, 0)  # must be a visible key frame, its first partition within the chunk
            if tag & 0x11 != 0x10 or tag >> 5 > len(body) - 10:
                break
            sides = int.from_bytes(body[6:10], "little")
            size = sides & 0x3FFF, sides >> 16 & 0x3FFF
            return _Still([*pieces, _filled(whole, body)], size, bool(pieces), kind, body)
        elif kind == b"VP8L" and len(body) > 5 and body[0] == 0x2F and body[4] < 0x20:
            bits = int.from_bytes(body[1:5], "little")
            size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
            return _Still([_filled(whole, body)], size, bool(bits >> 28 & 1), kind, body)
    raise ImageError(_DAMAGED)


def _filled(whole: memoryview, body: memoryview) -> bytes | memoryview:
    """Return a chunk whose padding byte is zero."""
    if not len(body) & 1 or len(whole) == 8 + len(body) or bytes(whole[-1:]) == b"\0":
        return whole
    return bytes(whole[:-1]) + b"\0"


def _u24(view: memoryview, at: int) -> int:
    return int.from_bytes(view[at : at + 3], "little")
