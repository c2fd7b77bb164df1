"""Bytes in, events out: the stream format of server-sent events.

The parser keeps the rules of the WHATWG HTML standard, sections 9.2.5 and 9.2.6
(https://html.spec.whatwg.org/multipage/server-sent-events.html), to the letter. One rule is
added, for servers that leave out the blank line between their events: a data line that is a
whole JSON object, or ``[DONE]``, ends its event.

Time is linear: a packet is split into lines at once, the bytes after its last line end wait in
`_line`, and no byte is searched twice. Lines are split as bytes and decoded afterwards. The
result is the same as if the stream were decoded first, since line ends, colons and spaces are
ASCII, whose bytes UTF-8 uses in no other character; and a character that is split between two
packets is decoded whole. (`str.splitlines` would be wrong: it splits at U+2028, which is legal
inside JSON.)
"""

from __future__ import annotations

from typing import Any

import msgspec

from moondream_async.errors import StreamProtocolError

from .decoding import decode

BOM = b"\xef\xbb\xbf"

# 31,000 years. The standard has no bound, but int() refuses more than 4,300 digits.
_MAX_RETRY_MS = 10**15 - 1


# gc=False: text and numbers can't be part of a cycle, and streams have very many events.
class ServerSentEvent(msgspec.Struct, frozen=True, repr_omit_defaults=True, gc=False):
    """One event of a stream. Its repr leaves out fields with their default value."""

    data: str
    """The values of its ``data`` lines, joined by line feeds."""
    event: str = "message"
    """The event's type."""
    id: str = ""
    """The last id in the stream, of this event or of one before it."""
    retry: int | None = None
    """Milliseconds to wait before reconnecting, if this event has the field."""


class SSEParser:
    r"""Turns the bytes of one stream into its events.

    Memory is bounded: an event's data so far and the unfinished line together have at most
    `max_event_bytes`. So have the type and the id, which are one line each. Comments and unknown
    fields are dropped at the end of their line: heartbeats may go on for ever, one line may not.

    An event whose first data line is a JSON object or ``[DONE]`` has no other data lines. It is
    handed out at the end of that line; the lines that follow belong to the next event, and a
    blank line between the two is ignored.

    Attributes:
        last_event_id: The value for ``Last-Event-ID`` when reconnecting, or "".
        retry: Milliseconds to wait before reconnecting; None until the stream has said so.

    >>> parser = SSEParser()
    >>> parser.feed(b'data: {"chunk": "a "}\ndata: {"chunk": "cat"}\n')
    [ServerSentEvent(data='{"chunk": "a "}'), ServerSentEvent(data='{"chunk": "cat"}')]
    """

    def __init__(self, *, max_event_bytes: int = 16 * 1024 * 1024) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self._max_event_bytes = max_event_bytes
        self._failed = False
        self._at_start = True  # a byte order mark may still come
        self._after_cr = False  # a line feed that comes next belongs to the last line end
        # The unfinished line. Appending to a bytearray takes linear time in total, like a list
        # of parts, without the fifty bytes of an object for each tiny packet.
        self._line = bytearray()
        # The buffers of section 9.2.6. None means no data line yet: an empty one counts.
        self._data: bytes | bytearray | None = None
        self._value: dict[str, Any] | None = None  # the JSON object of a data line
        self._event = ""
        self._id = ""
        self._event_retry: int | None = None
        self._room = max_event_bytes  # bytes that `_data` leaves for the unfinished line

    @property
    def idle(self) -> bool:
        """Whether the parser holds nothing back: no unfinished line, no field of an open event."""
        return not (
            self._at_start
            or self._line
            or self._data is not None
            or self._event
            or self._event_retry is not None
            or self._id != self.last_event_id
            or self._failed
        )

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        r"""Take the next bytes off the wire; return the events they complete.

        The bytes may be cut anywhere, even inside a CRLF or a UTF-8 character. The rest of
        them waits for the next call; at the end of the stream the rest is an unfinished event,
        which the standard says to drop.

        Raises:
            StreamProtocolError: One event passed `max_event_bytes`. The stream cannot be
                resumed, and every later call raises, too. If events before it were completed
                by the same packet, they are returned, and the next call raises.

        >>> parser = SSEParser()
        >>> parser.feed(b'data: {"chunk": "a c')
        []
        >>> parser.feed(b'at"}\n\n')
        [ServerSentEvent(data='{"chunk": "a cat"}')]
        """
        return [event for event, _ in self.read(data)]

    def read(self, data: bytes) -> list[tuple[ServerSentEvent, dict[str, Any] | None]]:
        """Do the same as `feed`; return each event with the JSON object of its data, or None."""
        events: list[tuple[ServerSentEvent, dict[str, Any] | None]] = []
        if not self._failed:
            lines = self._split(data)
            rest = lines.pop()
            if self._take(lines, events) and len(self._line) + len(rest) <= self._room:
                self._line += rest
            else:
                self._fail()
        if self._failed and not events:
            raise StreamProtocolError(
                f"One event of the stream is over the limit of {self._max_event_bytes} bytes"
            )
        return events

    def _split(self, data: bytes) -> list[bytes]:
        """Return the lines that end in `data`, and as the last item the bytes after them."""
        if self._at_start:
            data = bytes(self._line) + data
            self._line.clear()
            if len(data) < len(BOM) and BOM.startswith(data):
                return [data]
            data = data.removeprefix(BOM)
            self._at_start = False
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = data.split(b"\n")
        if self._line and len(lines) > 1:
            self._line += lines[0]
            lines[0] = bytes(self._line)
            self._line.clear()
        return lines

    def _take(
        self, lines: list[bytes], events: list[tuple[ServerSentEvent, dict[str, Any] | None]]
    ) -> bool:
        """Add the events that whole lines complete; return False at a line over the limit."""
        for line in lines:
            if line:
                if len(line) > self._room:
                    return False
                value = line[6:] if line[:6] == b"data: " else self._field(line)
                if value is None or not self._gather(value):
                    continue
            found, self._value = self._value, None
            event = self._dispatch()
            if event is not None:
                events.append((event, found))
        return True

    def _field(self, line: bytes) -> bytes | None:
        """Process a line of any field; return the value of a data line, None for others."""
        name, _, value = line.partition(b":")  # a comment has the empty name
        value = value.removeprefix(b" ")
        if name == b"data":
            return value
        if name == b"event":
            self._event = _decode(value)
        elif name == b"id":
            if b"\0" not in value:
                self._id = _decode(value)
        elif name == b"retry" and value.isdigit():  # of bytes: ASCII digits, at least one
            self.retry = min(int(value.lstrip(b"0")[:16] or b"0"), _MAX_RETRY_MS)
            self._event_retry = self.retry
        return None

    def _gather(self, value: bytes) -> bool:
        """Add the value of a data line; return whether the event ends with it."""
        if self._data is None:
            self._data = value
            self._room -= len(value)
            self._value = _object(value)
            return self._value is not None or value == b"[DONE]"
        if isinstance(self._data, bytes):
            self._data = bytearray(self._data)
        self._data += b"\n"
        self._data += value
        self._room -= len(value) + 1
        return False

    def _dispatch(self) -> ServerSentEvent | None:
        """End the block; return its event, or None if it had no data."""
        self.last_event_id = self._id
        event = None
        if self._data is not None:
            event = ServerSentEvent(
                _decode(self._data), self._event or "message", self._id, self._event_retry
            )
            self._data = None
            self._room = self._max_event_bytes
        self._event = ""
        self._event_retry = None
        return event

    def _fail(self) -> None:
        """Refuse all further bytes, and release the memory."""
        self._failed = True
        self._line.clear()
        self._data = self._value = None


def _decode(value: bytes | bytearray) -> str:
    return value.decode("utf-8", "replace")


def _object(value: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a data line; None if the line is not one."""
    if value[:1] != b"{":
        return None
    try:
        found = decode(_decode(value).encode())  # keeps JSON with bytes that are no UTF-8
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
