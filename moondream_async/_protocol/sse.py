"""Bytes in, events out: the stream format of server-sent events.

The rules are those of the WHATWG HTML standard, sections 9.2.5 and 9.2.6
(https://html.spec.whatwg.org/multipage/server-sent-events.html), to the letter.
One thing goes beyond them, for servers that leave out the blank line between their events:
a data line that is a whole JSON object ends its event, and so does ``[DONE]``.

Time is linear: a packet is cut into lines in one go, what follows its last line
end waits in `_line`, and no byte is searched twice. Lines stay bytes, and a value
is decoded whole. Line ends, colons and spaces are ASCII, which UTF-8 uses in no
other character, so this gives what decoding the stream first would give, and a
character split between two packets comes out right. (`str.splitlines` would not
do: it cuts at U+2028, which is legal inside JSON.)
"""

from __future__ import annotations

from typing import Any

import msgspec

from moondream_async.errors import StreamProtocolError

from .decoding import decode

BOM = b"\xef\xbb\xbf"

# 31,000 years. The standard has no bound, but int() refuses more than 4,300 digits.
_MAX_RETRY_MS = 10**15 - 1


# gc=False: text and numbers can't be part of a cycle, and there are very many events.
class ServerSentEvent(msgspec.Struct, frozen=True, repr_omit_defaults=True, gc=False):
    """One event of a stream. Its repr leaves out what is at its default."""

    data: str
    """The values of its ``data`` lines, joined by line feeds."""
    event: str = "message"
    """Its type."""
    id: str = ""
    """The last id that the stream gave, in this event or in one before."""
    retry: int | None = None
    """Milliseconds to wait before reconnecting, where this event's own lines said so."""


class SSEParser:
    r"""Turns the bytes of one stream into its events.

    Memory is bounded: the data of an event so far and the line under way, in bytes,
    may not come to more than `max_event_bytes`. The type and the id are one line
    each, so that they are within it too. Comments and unknown fields are dropped as
    their lines end: heartbeats may go on for ever, a line without end may not.

    The first data line of an event is the whole of it if it is a JSON object, or ``[DONE]``:
    neither can be the first of several lines. Such an event is handed out as soon as its line
    has ended: lines that follow belong to the next one, and a blank line does no harm.

    Attributes:
        last_event_id: What to send as ``Last-Event-ID`` when reconnecting, or "".
        retry: Milliseconds to wait before reconnecting, once the stream has said so.

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
        self._after_cr = False  # a line feed would be the rest of the last line end
        # The line under way. Appending to a bytearray takes linear time in all, as
        # to a list of parts, but no fifty bytes a part where packets are tiny.
        self._line = bytearray()
        # The buffers of section 9.2.6. None is "no data line yet": an empty one counts.
        self._data: bytes | bytearray | None = None
        self._value: dict[str, Any] | None = None  # of a data line that is one
        self._event = ""
        self._id = ""
        self._event_retry: int | None = None
        self._room = max_event_bytes  # what `_data` leaves for the line under way

    @property
    def idle(self) -> bool:
        """Whether nothing is pending: no line is under way, no field waits for its event's end."""
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

        The cut may fall anywhere, even inside a CRLF or a UTF-8 character. What
        is left over waits for the next call. At the end of the stream that is an
        unfinished event, which the standard says to drop.

        Raises:
            StreamProtocolError: One event passed `max_event_bytes`. The stream
                cannot be resumed, and every later call raises too. Events that were
                completed before, in the same packet, are not lost: they are
                returned, and the error waits for the next call, even ``feed(b"")``.

        >>> parser = SSEParser()
        >>> parser.feed(b'data: {"chunk": "a c')
        []
        >>> parser.feed(b'at"}\n\n')
        [ServerSentEvent(data='{"chunk": "a cat"}')]
        """
        return [event for event, _ in self.read(data)]

    def read(self, data: bytes) -> list[tuple[ServerSentEvent, dict[str, Any] | None]]:
        """Do what `feed` does; return with each event the JSON object that its one line is."""
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
        """Return the lines that end in `data`, then what follows the last of them."""
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
        """Add to `events` what whole lines complete; return False at one over the limit."""
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
        """Process a line of any kind; return its value if it is a data line."""
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
        """Refuse all further bytes, and give up the memory."""
        self._failed = True
        self._line.clear()
        self._data = self._value = None


def _decode(value: bytes | bytearray) -> str:
    return value.decode("utf-8", "replace")


def _object(value: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a data line is, if it is one."""
    if value[:1] != b"{":
        return None
    try:
        found = decode(_decode(value).encode())  # text that is no UTF-8 is no reason to lose it
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
