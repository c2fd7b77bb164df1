// Asks the page's own server, and yields the events of the answer as {type, data}: `chunk`,
// `reasoning`, `bbox`, `done` and `error`, as Stream.sse in Python has them. Aborting the signal
// closes the connection; then the server closes its own to the model. The body is a line of JSON,
// which holds no line breaks, and then the picture's file.

export async function* ask(question, picture, signal) {
  const body = new Blob([JSON.stringify(question), "\n", picture], { type: "application/octet-stream" });
  const response = await fetch("/ask", { method: "POST", body, signal });
  const kind = response.headers.get("Content-Type") ?? "";
  if (kind.startsWith("text/event-stream")) {
    yield* events(response.body);
  } else {
    const data = await response.json();
    yield data.error ? { type: "error", data } : { type: "done", data };
  }
}

// Events end with a blank line; the cuts between blocks of bytes fall anywhere.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = read(block);
      if (event) yield event;
    }
  }
}

function read(block) {
  const event = { type: "message", data: "" };
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) event.type = line.slice(7);
    if (line.startsWith("data: ")) event.data += line.slice(6);
  }
  // A block without data is a comment: a heartbeat.
  return event.data && { type: event.type, data: JSON.parse(event.data) };
}
