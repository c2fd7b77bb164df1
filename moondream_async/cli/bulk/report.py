"""One page of pictures and answers, which needs no other file and no network."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

from moondream_async._images import encode_image
from moondream_async.cli._files import replacing
from moondream_async.cli._words import limits_in_words
from moondream_async.errors import MoondreamError, RequestError

from .lines import Records, answer_of
from .sources import picture_of

MOST = 1000
"""Pictures on a page: a browser has to hold them all. Pictures that failed come first."""
_PIXELS = 240 * 180  # of a small picture
_REFUSED = ("ImageError", "RequestError")

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Moondream report</title>
<style>
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
main { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
figure { border: 1px solid #8886; border-radius: .5rem; margin: 0; overflow: hidden; }
.picture { background: #8882; display: grid; min-height: 6rem; place-items: center; }
.frame { display: inline-block; line-height: 0; position: relative; }
.frame img { max-width: 100%; }
.frame svg { height: 100%; inset: 0; position: absolute; width: 100%; }
rect { fill: none; stroke: #e0115f; stroke-width: 2; vector-effect: non-scaling-stroke; }
ellipse { fill: #e0115f; stroke: #fff; vector-effect: non-scaling-stroke; }
figcaption { padding: .6rem .8rem .8rem; overflow-wrap: anywhere; }
.path { font-size: .8rem; margin: 0 0 .3rem; opacity: .7; }
.error { border-color: #c22; }
.error .said { color: #c22; }
p { margin: 0; }
</style>
"""


def write_report(records: Records, path: str) -> None:
    """Write the page of a journal's lines. It blocks, and takes some milliseconds a picture."""
    failed = sum(1 for record in records() if record.get("error"))
    total = sum(1 for _ in records())
    shown = list(islice((r for r in records() if r.get("error")), MOST))
    shown += islice((r for r in records() if not r.get("error")), MOST - len(shown))
    asked = shown[0] if shown else {}
    what = [asked.get(name) for name in ("skill", "question", "object", "length")]
    with replacing(path) as file:

        def write(text: str) -> None:
            file.write(text.encode("utf-8", "replace"))

        write(_HEAD)
        title = ": ".join(str(each) for each in what if each) or "No pictures"
        write(f"<h1>{html.escape(title)}</h1>\n")
        left = f"; {len(shown):,} of them are shown" if len(shown) < total else ""
        write(f"<p>{total - failed:,} answered, {failed:,} failed{left}.</p><br>\n<main>\n")
        for record in shown:
            write(_figure(record))
        write("</main>\n</html>\n")


def check_report(path: str) -> None:
    """Refuse, by a RequestError, to write over a file that is no such page."""
    try:
        regular = os.path.isfile(path)  # noqa: PTH113 - a string
        with open(path if regular else os.devnull, "rb") as file:  # noqa: PTH123
            begun = file.read(len(_HEAD.encode()))
    except OSError:
        return  # writing the page will fail, and say why
    if begun and b"<title>Moondream report</title>" not in begun:
        raise RequestError(f"'--report {path}' is there already, and is no report: name another")


def _figure(record: dict[str, Any]) -> str:
    error = record.get("error")
    picture = _thumbnail(record)
    if picture:
        marks = "".join(_marks(record))
        drawn = f'<svg viewBox="0 0 1 1" preserveAspectRatio="none">{marks}</svg>' if marks else ""
        picture = f'<span class="frame"><img alt="" src="{picture}">{drawn}</span>'
    return (
        f'<figure{" class=error" if error else ""}><div class="picture">'
        f"{picture or 'no picture'}</div><figcaption>"
        f'<p class="path">{html.escape(record["path"])}</p>'
        f'<p class="said">{html.escape(_said(record))}</p></figcaption></figure>\n'
    )


def _said(record: dict[str, Any]) -> str:
    if error := record.get("error"):
        return limits_in_words(f"{error.get('type')}: {error.get('message')}")
    if (answer := answer_of(record)) is not None:
        return str(answer)
    for name in ("objects", "points"):
        if name in record:
            return f"{len(record[name])} found"
    return ""


def _marks(record: dict[str, Any]) -> Iterator[str]:
    """Yield boxes and points as SVG, in 0-1 of the picture."""
    for box in record.get("objects", ()):
        x, y = box["x_min"], box["y_min"]
        width, height = box["x_max"] - x, box["y_max"] - y
        yield f'<rect x="{x:.4f}" y="{y:.4f}" width="{width:.4f}" height="{height:.4f}"/>'
    for point in record.get("points", ()):
        yield f'<ellipse cx="{point["x"]:.4f}" cy="{point["y"]:.4f}" rx="0.02" ry="0.02"/>'


def _thumbnail(record: dict[str, Any]) -> str | None:
    """Return a small copy as a data URI, upright as the server saw it; None if there is none.

    A line that was edited may name any file: only the file that was asked about is shown,
    after the client's own preparation, and no file that this preparation refused is opened.
    """
    if record.get("error", {}).get("type") in _REFUSED:
        return None
    data = picture_of(record)
    if data is None:
        return None
    try:
        small = encode_image(data, max_pixels=_PIXELS)
    except MoondreamError:
        return None
    return f"data:{small.media_type};base64,{base64.b64encode(small.data).decode()}"
