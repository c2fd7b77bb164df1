"""What the commands that ask a server print: answers as text and as JSON, and remarks."""

import json

import pytest
from commands import is_one_line
from PIL import Image
from raw_server import CHUNKED, DONE, EVENT_STREAM, event, head, in_chunks
from remote_server import serving

from moondream_async.simulator import Simulator, SimulatorThread

pytestmark = pytest.mark.slow  # on one Python version

# -- text -------------------------------------------------------------------------------


def test_caption_prints_the_same_text_however_it_is_asked_for(command, moondream_simulator, photo):
    moondream_simulator.script.caption("A cat sleeps.", times=3)
    expected = (0, "A cat sleeps.\n", "")
    assert command("caption", photo) == expected
    assert command("caption", photo, "--no-stream") == expected
    assert command("caption", "-", stdin=photo.read_bytes()) == expected
    requests = moondream_simulator.requests
    assert [each.stream for each in requests] == [True, False, True]
    assert requests[2].images == requests[0].images


def test_options_reach_the_server(command, moondream_simulator, photo):
    settings = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.25}
    options = ["--max-tokens", 5, "--temperature", 0.5, "--top-p", 0.25, "--model", "m"]
    command("caption", photo, "--length", "short", *options, "--timeout", 60)
    command("query", photo, "How many?", "--no-reasoning", *options, "--timeout", 60)
    caption, query = (request.body for request in moondream_simulator.requests)
    assert (caption["length"], caption["model"], caption["settings"]) == ("short", "m", settings)
    assert (query["question"], query["model"], query["settings"]) == ("How many?", "m", settings)
    assert query["reasoning"] is False


def test_query_without_a_picture_sends_none(command, moondream_simulator):
    status, output, errors = command("query", "What can you do?", "--no-image")
    assert (status, errors) == (0, "")
    assert "No picture came" in output
    assert "image_url" not in moondream_simulator.requests[-1].body


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_reasoning_goes_to_stderr_and_the_answer_alone_to_stdout(
    command, moondream_simulator, photo, how
):
    moondream_simulator.script.query("Two.", reasoning="I count them.", times=None)
    said = command("query", photo, "How many?", "--reasoning", how)
    assert said == (0, "Two.\n", "Reasoning: I count them.\n")


def test_detect_prints_a_box_a_line_and_draws_them(command, photo, tmp_path):
    status, output, errors = command("detect", photo, "red circle", "--save", "found.png")
    assert status == 0
    assert [float(number) for number in output.split()] == pytest.approx(
        [0.0938, 0.375, 0.3438, 0.7083], abs=0.01
    )
    assert "found.png" in errors
    with Image.open(tmp_path / "found.png") as drawn, Image.open(photo) as before:
        assert drawn.size == before.size
        assert drawn.convert("RGB").tobytes() != before.convert("RGB").tobytes()
    assert len(list(tmp_path.iterdir())) == 1  # and nothing half written beside it


@pytest.mark.parametrize("target", ["found.bmp", "found", "missing/found.png", "folder.png"])
def test_a_file_that_cannot_be_saved_is_refused_before_anything_is_asked(
    command, photo, tmp_path, moondream_simulator, target
):
    (tmp_path / "folder.png").mkdir()
    status, output, errors = command("detect", photo, "circle", "--save", target)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert moondream_simulator.requests == []


def test_segment_prints_the_refined_path(command, photo):
    status, output, errors = command("segment", photo, "red circle")
    assert status == 0
    assert output.startswith("M ")
    assert output.rstrip().endswith("Z")
    assert "translate(" in errors


_NOTHING = "Nothing found."
_EMPTY = "The answer is empty."


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("detect {photo} unicorn", _NOTHING),
        ("point {photo} unicorn", _NOTHING),
        ("segment {photo} unicorn", _NOTHING),
        ("segment {photo} unicorn --stream", _NOTHING),
        ("caption {photo}", _EMPTY),
        ("query {photo} Why? --no-stream", _EMPTY),
        ("chat", _EMPTY),
    ],
)
def test_nothing_found_or_said_is_told_and_is_no_error(
    command, photo, moondream_simulator, asked, said
):
    script = moondream_simulator.script
    for scripted in (script.caption, script.query, script.chat):
        scripted("", times=None)
    output = command(*asked.format(photo=photo).split(), stdin=b"Why?\n")
    assert output == (0, "", f"{said}\n")


def test_a_cut_stream_prints_what_had_arrived_and_then_the_error(
    command, moondream_simulator, photo
):
    moondream_simulator.faults.append("cut=3")
    status, output, errors = command("caption", photo)
    assert (status, output) == (1, "A bright 640\N{MULTIPLICATION SIGN}480\n")
    assert is_one_line(errors)


def test_models_are_a_line_each(command):
    status, output, _ = command("models")
    assert status == 0
    assert "moondream3-preview" in output.splitlines()
    _, output, _ = command("models", "--json")
    assert {"id": "moondream3-preview", "object": "model"} in map(json.loads, output.splitlines())


# -- JSON -------------------------------------------------------------------------------

KEYS = {
    "caption": ["caption", "request_id", "finish_reason", "metrics", "ttft"],
    "query": ["answer", "reasoning", "request_id", "finish_reason", "metrics", "ttft"],
}


@pytest.mark.parametrize("skill", KEYS)
def test_json_is_one_object_with_all_keys(skill, command, moondream_simulator, photo):
    getattr(moondream_simulator.script, skill)("A cat.")
    arguments = [skill, photo, *["What colour?"] * (skill == "query")]
    status, output, errors = command(*arguments, "--json")
    assert (status, errors, output.count("\n")) == (0, "", 1)
    answer = json.loads(output)
    assert list(answer) == KEYS[skill]
    assert answer[KEYS[skill][0]] == "A cat."
    assert answer["request_id"]
    assert answer["finish_reason"] == "stop"
    assert answer["metrics"]["output_tokens"] > 0
    assert answer["ttft"] is None


@pytest.mark.parametrize("skill", KEYS)
def test_json_of_a_stream_is_a_line_for_each_event(skill, command, photo):
    arguments = [skill, photo, *["What colour?"] * (skill == "query")]
    with SimulatorThread(Simulator("kestrel")) as simulator:
        getattr(simulator.script, skill)(["A ", "cat."])
        endpoint = {"MOONDREAM_ENDPOINT": simulator.endpoint}
        status, output, _ = command(*arguments, "--json", "--stream", **endpoint)
    assert status == 0
    *events, final = map(json.loads, output.splitlines())
    assert events == [{"event": "chunk", "chunk": "A "}, {"event": "chunk", "chunk": "cat."}]
    assert list(final) == ["event", *KEYS[skill]]
    assert (final["event"], final["finish_reason"]) == ("final", "stop")
    assert final[KEYS[skill][0]] == "A cat."
    assert final["ttft"] > 0


def test_json_of_a_stream_tells_of_metrics_and_unknown_events(command, photo):
    said = event("Hi"), event(stats={"tokens": 1}), event(type="mood", value=3), DONE

    async def play(peer):
        await peer.request()
        await peer.send(head(EVENT_STREAM, CHUNKED), in_chunks(*said))

    with serving(play) as server:
        endpoint = {"MOONDREAM_ENDPOINT": server.endpoint}
        _, output, _ = command("caption", photo, "--json", "--stream", **endpoint)
    assert [json.loads(line) for line in output.splitlines()[:-1]] == [
        {"event": "chunk", "chunk": "Hi"},
        {"event": "metrics", "metrics": {"tokens": 1}},
        {"event": "unknown", "name": "mood", "raw": {"type": "mood", "value": 3}},
    ]


def test_point_gives_json(command, photo):
    status, output, _ = command("point", photo, "blue square", "--json")
    assert status == 0
    found = json.loads(output)
    assert found["points"][0] == pytest.approx({"x": 0.5156, "y": 0.6458}, abs=0.01)
    assert set(found) == {"points", "request_id", "finish_reason", "metrics"}


def test_segment_streams_its_events(command, photo):
    status, output, _ = command("segment", photo, "red circle", "--json", "--stream")
    assert status == 0
    events = [json.loads(line) for line in output.splitlines()]
    assert events[0]["event"] == "bbox"
    assert {event["event"] for event in events[1:-1]} == {"chunk"}
    assert events[-1]["event"] == "final"
    assert events[-1]["path"].startswith("M ")


# -- chat from a pipe; in a terminal it is in test_cli_terminal ---------------------------


def test_chat_takes_a_message_a_line_and_remembers(command, photo, moondream_simulator):
    lines = b"What colours?\nWhere is the red circle?\n"
    status, output, errors = command("chat", photo, "--system", "Be brief.", stdin=lines)
    assert (status, errors) == (0, "")
    assert len(output.splitlines()) == 2
    first, second = [request.body["messages"] for request in moondream_simulator.requests]
    assert [message["role"] for message in first] == ["system", "user"]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert second[2]["content"] == output.splitlines()[0]
    assert second[1]["content"][1]["type"] == "image_url"  # the picture is still there


def test_chat_from_a_pipe_ends_at_the_first_error(command, moondream_simulator):
    moondream_simulator.faults.append("status=400")
    status, output, errors = command("chat", stdin=b"Hello\nHello again\n")
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert len(moondream_simulator.requests) == 1


def test_chat_takes_text_alone(command, moondream_simulator):
    status, output, errors = command("chat", stdin=b"\xff\n")
    assert (status, output) == (1, "")
    assert is_one_line(errors)
    assert "What stdin gives is no text: " in errors
    assert moondream_simulator.requests == []


# -- batches ------------------------------------------------------------------------------


def test_a_batch_goes_up_and_its_answers_come_down(command, photo, tmp_path):
    asked = ("--skill", "query", "--question", "What colours?")
    status, output, _ = command("batch", "create", photo, *asked)
    assert status == 0
    batch = output.split()[0]
    status, output, _ = command("batch", "wait", batch)
    assert status == 0
    assert "completed" in output
    status, output, errors = command("batch", "results", batch, "-o", "answers.jsonl")
    assert (status, output) == (0, "")
    assert "1 answers" in errors
    answer = json.loads((tmp_path / "answers.jsonl").read_text("utf-8"))
    assert answer["id"] == str(photo)
    assert "white" in answer["result"]["answer"]
    assert len(list(tmp_path.iterdir())) == 1
    assert batch in command("batch", "list")[1]


def test_results_that_fail_leave_the_old_file_and_name_it(command, tmp_path):
    (tmp_path / "answers.jsonl").write_text("old")
    status, _, errors = command("batch", "results", "nothing", "-o", "answers.jsonl")
    assert (status, errors.count("\n")) == (1, 1)
    assert (tmp_path / "answers.jsonl").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
    status, _, errors = command("batch", "results", "nothing", "-o", "missing/answers.jsonl")
    assert (status, errors.count("\n")) == (1, 1)
    assert "'missing/answers.jsonl'" in errors
