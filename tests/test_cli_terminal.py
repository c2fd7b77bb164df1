"""What a server says reaches a terminal as text, and never as an order to it."""

import contextlib
import http.server
import io
import json
import sys
import threading
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moondream_async.cli import main

ORDERS = "\x1b]0;owned\x07\x1b[2J\x9b2J\x7f\x08\r\x00\u202e\u2066"
BOX = {"x_min": 0.1, "y_min": 0.1, "x_max": 0.5, "y_max": 0.5}


class Answers(http.server.BaseHTTPRequestHandler):
    """Says the same in every place that a command could print."""

    protocol_version = "HTTP/1.0"

    def do_GET(self):
        said = self.server.said
        path = self.path.partition("?")[0]
        batch = {
            "id": said,
            "status": "completed",
            "progress": {"total": 1, "completed": 1, "failed": 0},
            "outputs": [{"index": 0, "url": f"http://{self.headers['Host']}/output"}],
            "error": {"code": said, "message": said},
        }
        if path.endswith("/models"):
            self.answer({"data": [{"id": said, "name": said, "description": said}]})
        elif path.endswith("/batch"):
            self.answer({"batches": [batch], "has_more": False})
        elif path == "/output":
            self.answer({"line_index": 0, "id": said, "status": "ok", "result": {"caption": said}})
        else:
            self.answer(batch)

    def do_POST(self):
        said = self.server.said
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.refuses:
            self.answer({"error": {"message": said, "code": said, "type": said}}, 400)
        elif asked.get("stream"):
            self.stream(said, chat="messages" in asked)
        else:
            about = {"request_id": said, "finish_reason": said, "metrics": {said: said}}
            reasoning = {"text": said, "grounding": []}
            texts = {"caption": said, "answer": said, "path": said, "reasoning": reasoning}
            places = {"objects": [BOX], "points": [{"x": 0.5, "y": 0.5}], "bbox": BOX}
            self.answer(texts | places | about)

    def stream(self, said, *, chat):
        if chat:
            events = [{"choices": [{"delta": {"content": said}, "finish_reason": said}]}]
        else:
            about = {"request_id": said, "finish_reason": said, "path": said, "parse_error": said}
            events = [
                {"chunk": said},
                {"type": said, "value": said},
                {"reasoning": said},
                {"stats": {said: said}},
                {"chunk": "", "completed": True, "type": "final", "metrics": {said: 1}} | about,
            ]
        lines = "".join(f"data: {json.dumps(each)}\n\n" for each in events)
        self.answer(f"{lines}data: [DONE]\n\n".encode() if chat else lines.encode())

    def answer(self, body, status=200):
        self.send_response(status)
        is_stream = isinstance(body, bytes)
        self.send_header("Content-Type", "text/event-stream" if is_stream else "application/json")
        self.end_headers()
        self.wfile.write(body if is_stream else json.dumps(body).encode())

    def log_message(self, *_):
        pass


class Server(http.server.HTTPServer):
    """One connection at a time, and none of them left when `idle` is set."""

    def __init__(self, *args):
        self.idle = threading.Event()
        super().__init__(*args)

    def get_request(self):
        self.idle.clear()
        return super().get_request()

    def shutdown_request(self, request):
        super().shutdown_request(request)
        self.idle.set()


@pytest.fixture(scope="module")
def server():
    with Server(("127.0.0.1", 0), Answers) as server:
        server.refuses = False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Terminal(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8", errors="replace", write_through=True)

    def isatty(self):
        return True


def shown_by(server, args, typed=""):
    """Run a command on a terminal; return all that came there, and its exit status."""
    terminal = Terminal()
    endpoint = ["--endpoint", f"http://127.0.0.1:{server.server_port}/v1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(typed))
        patch.setenv("TERM", "dumb")
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            status = main([*args, *endpoint])
    server.idle.wait()
    terminal.flush()
    return terminal.buffer.getvalue().decode("utf-8"), status


def is_order(character):
    """Whether a terminal could do something else than show it."""
    return (unicodedata.category(character) == "Cc" and character not in "\n\t") or (
        character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


COMMANDS = {
    "caption": ["caption", "{photo}"],
    "caption-whole": ["caption", "{photo}", "--no-stream"],
    "caption-json": ["caption", "{photo}", "--json"],
    "caption-events": ["caption", "{photo}", "--json", "--stream"],
    "query": ["query", "{photo}", "What?", "--reasoning"],
    "query-whole": ["query", "{photo}", "What?", "--no-stream"],
    "query-json": ["query", "{photo}", "What?", "--json"],
    "query-events": ["query", "{photo}", "What?", "--json", "--stream"],
    "detect-json": ["detect", "{photo}", "cat", "--json"],
    "point-json": ["point", "{photo}", "cat", "--json"],
    "segment": ["segment", "{photo}", "cat"],
    "segment-stream": ["segment", "{photo}", "cat", "--stream"],
    "segment-json": ["segment", "{photo}", "cat", "--json"],
    "segment-events": ["segment", "{photo}", "cat", "--json", "--stream"],
    "chat": ["chat"],
    "chat-json": ["chat", "--json"],
    "models": ["models"],
    "models-json": ["models", "--json"],
    "batch-list": ["batch", "list"],
    "batch-list-json": ["batch", "list", "--json"],
    "batch-get": ["batch", "get", "b"],
    "batch-wait-json": ["batch", "wait", "b", "--json"],
    "batch-results": ["batch", "results", "b"],
    "demo": ["demo"],
    "bulk": ["bulk", "{photo}", "-o", "{folder}/out.jsonl"],
    "bulk-lines": ["bulk", "{photo}", "-o", "-"],
}


@pytest.mark.parametrize("refuses", [False, True], ids=["answers", "refusals"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_control_sequence_reaches_a_terminal(command, refuses, server, photo, tmp_path):
    server.said, server.refuses = f"a{ORDERS}b", refuses
    args = [each.format(photo=photo, folder=tmp_path) for each in COMMANDS[command]]
    shown, status = shown_by(server, args, "Hello\n")
    assert status in (0, 1)
    assert [each for each in shown if is_order(each)] == []
    if "json" in command or "events" in command:
        answers = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
        assert bool(answers) == (status == 0)
        assert not answers or f"a{ORDERS}b" in str(answers).encode().decode("unicode_escape")


@given(
    said=st.text(st.characters(exclude_categories=()), min_size=1),
    command=st.sampled_from(["caption", "query-whole", "caption-events", "batch-list"]),
    json_too=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.slow
def test_any_text_is_shown_as_text(said, command, json_too, server, photo):
    server.said, server.refuses = said, False
    args = [each.format(photo=photo) for each in COMMANDS[command]]
    args += ["--json"] * (json_too and "--json" not in args)
    shown, _ = shown_by(server, args)
    assert [each for each in shown if is_order(each)] == []


def test_json_for_other_programs_says_the_same_and_can_be_read_back():
    from moondream_async.cli._output import encode_json

    said = {"caption": f"{ORDERS} \ud83d \U000e0041 \N{ZERO WIDTH JOINER} \N{GRINNING FACE} é"}
    line = encode_json(said)
    assert json.loads(line) == said
    assert "é" in line.decode()
    assert not any(is_order(each) for each in line.decode())
