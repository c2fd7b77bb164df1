"""Moondream Station as it is published, with a stand-in for its model.

    python station.py

prints the port that it listens on, and ends with its standard input. Each line that
comes there lets one call go on that was asked to wait.
"""

import base64
import re
import sys
import threading
from types import SimpleNamespace

REASONING = {
    "text": "I count bytes.",
    "grounding": [{"start_idx": 8, "end_idx": 13, "points": [[0.5, 0.5]]}],
}


class StandIn:
    """What Station calls a backend: a method for each function, named as in the address."""

    def __init__(self):
        self.may_go_on = threading.Semaphore(0)

    def caption(self, image_url, length="normal", *, stream=False, **_):
        return {"caption": _say(f"A {length} “résumé” of {_count(image_url)} bytes.", stream)}

    def query(self, question, image_url=None, *, stream=False, reasoning=False, **_):
        text = f"{question} I see {_count(image_url)} bytes."
        if question == "Fail.":
            raise ValueError("bad thing")
        if question == "Wait.":
            self.may_go_on.acquire()
        if question == "Break off.":
            return {"answer": _break_off()}
        if question == "Say nothing.":
            text = ""
        # As one of Station's own backends does, whatever was asked for.
        stream = stream and question != "Whole."
        return {"answer": _say(text, stream), **({"reasoning": REASONING} if reasoning else {})}

    def detect(self, image_url, object, **_):
        box = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}
        return {"objects": [box] if _count(image_url) and object == "heron" else []}

    def point(self, image_url, object, **_):
        points = [{"x": 0.3, "y": 0.4}] if _count(image_url) and object == "heron" else []
        return {"points": points, "count": len(points)}


def _count(image_url):
    return len(base64.b64decode(image_url.partition(",")[2])) if image_url else 0


def _say(text, stream):
    return (word for word in re.findall(r"\S+\s*", text)) if stream else text


def _break_off():
    yield "Half "
    yield "an "
    raise ValueError("bad thing")


class Manifest:
    """What Station calls a manifest manager: it knows the models and loads them."""

    def __init__(self):
        self.model = StandIn()

    def get_models(self):
        info = SimpleNamespace(name="Stand-in", description="No model at all", version="1.2")
        return {"stand-in": info}

    def get_worker_backends(self, model_id, n_workers):
        return [self.model] * n_workers

    def clear_worker_backends(self):
        pass


class Session:
    """What counts Station's requests."""

    def __init__(self):
        self.state = {"requests_processed": 0}

    def record_request(self, path):
        self.state["requests_processed"] += 1


def main():
    from moondream_station.core.rest_server import RestServer

    manifest = Manifest()
    config = {"current_model": "stand-in", "inference_max_queue_size": 1}
    server = RestServer(config, manifest, session_state=Session())
    assert server.start("127.0.0.1", 0)
    print(server.server.servers[0].sockets[0].getsockname()[1], flush=True)  # noqa: T201 - a program
    for _ in sys.stdin:
        manifest.model.may_go_on.release()


if __name__ == "__main__":
    main()
