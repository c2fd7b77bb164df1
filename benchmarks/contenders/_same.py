"""What is the same for all contenders: the picture, and the bodies that are sent."""

import asyncio
import base64
import json
import random
from pathlib import Path

from benchmarks.wire import MODEL, QUESTION

PICTURE = b"\xff\xd8\xff\xe0" + random.Random(4).randbytes(10_000)
"""As large as a small JPEG; nobody looks at it."""
TYPE = "image/jpeg"
PICTURE_URL = f"data:{TYPE};base64,{base64.b64encode(PICTURE).decode()}"
TINY = PICTURE[:300]
"""For streams, where pictures are not what is measured."""
TINY_URL = f"data:{TYPE};base64,{base64.b64encode(TINY).decode()}"
MESSAGES = [{"role": "user", "content": QUESTION}]
EVENT_STREAM = {"Content-Type": "application/json", "Accept": "text/event-stream"}
JSON = {"Content-Type": "application/json"}
CAPTION = json.dumps({"image_url": TINY_URL, "length": "normal", "stream": True}).encode()
CHAT = json.dumps({"model": MODEL, "messages": MESSAGES, "stream": True}).encode()
CALL = json.dumps({"image_url": PICTURE_URL, "length": "normal", "stream": False}).encode()


def messages_about(path):
    """Return the messages that ask a chat about a picture."""
    image = base64.b64encode(Path(path).read_bytes()).decode()
    content = [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": f"data:{TYPE};base64,{image}"}},
    ]
    return [{"role": "user", "content": content}]


async def in_workers(ask, paths, at_once):
    """Ask about each picture, in as many workers as are to be at once; return the answers."""
    left = iter(paths)

    async def work():
        return [await ask(path) for path in left]

    found = await asyncio.gather(*(work() for _ in range(at_once)))
    return [answer for each in found for answer in each]
