"""A FastAPI backend as it runs in production: limits, errors, three ways to stream, and its end.

uvicorn production:app
"""

import asyncio
import contextlib
import math
import signal

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

import moondream_async as md

GRACE = 5.0  # seconds that answers get to be completed when the server is stopped

# As many streams as browsers are to be served at once; who waits 5 seconds for one is told so.
LIMITS = {"max_connections": 300, "timeout": md.Timeout(pool=5)}


@contextlib.contextmanager
def closed_at_sigterm(client):
    """Close the client as soon as the server is told to stop.

    uvicorn ends the lifespan only when all answers are complete, so there it would be too
    late to end them. Its own handler of the signal is called as well.
    """
    loop = asyncio.get_running_loop()
    closing = set()

    def close():
        closing.add(loop.create_task(client.aclose(grace=GRACE)))

    def stop(number, frame):
        loop.call_soon_threadsafe(close)
        before[number](number, frame)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, stop)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.asynccontextmanager
async def lifespan(app):
    async with md.MoondreamClient(**LIMITS) as app.state.client:
        with closed_at_sigterm(app.state.client):
            yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(md.MoondreamError)
async def failed(request, error):
    """Tell the browser what went wrong, with a status that is its own."""
    headers = {}
    match error:
        case md.ImageError():
            status = 415
        case md.RequestError():
            status = 400
        case md.RateLimitError():
            status = 429
            headers["Retry-After"] = str(math.ceil(error.retry_after or 1))
        case md.APITimeoutError(phase="pool") | md.ClientClosedError():
            status = 503
            headers["Retry-After"] = "5"
        case md.APITimeoutError():
            status = 504
        case _:
            status = 502
    return JSONResponse({"error": str(error)}, status, headers)


@app.post("/describe")
async def describe(request: Request):
    """Server-Sent Events for a picture that is posted."""
    stream = await app.state.client.caption(await request.body(), stream=True)
    events = stream.sse()
    return StreamingResponse(events, headers=events.headers)


@app.post("/text")
async def text(request: Request):
    """Plain text for a picture that is posted."""
    stream = await app.state.client.caption(await request.body(), stream=True)
    pieces = stream.chunk_bytes()
    return StreamingResponse(pieces, headers=pieces.headers)


@app.websocket("/ws")
async def socket(browser: WebSocket):
    """A picture comes in, pieces of text go out, as often as the browser likes."""
    await browser.accept()
    coming = asyncio.create_task(browser.receive())
    while picture := (await coming).get("bytes"):
        sending = asyncio.create_task(answer(browser, picture))
        # Only who receives is told that a browser has gone; it may send its next picture, too.
        coming = asyncio.create_task(browser.receive())
        try:
            await asyncio.wait([sending, coming], return_when=asyncio.FIRST_COMPLETED)
            if coming.done() and not coming.result().get("bytes"):
                sending.cancel()
            await asyncio.wait([sending])
        finally:
            sending.cancel()


async def answer(browser, picture):
    try:
        async with app.state.client.caption(picture, stream=True) as stream:
            async for piece in stream.chunk:
                await browser.send_json({"chunk": piece})
        await browser.send_json({"done": True})
    except md.MoondreamError as error:
        await browser.send_json({"error": str(error)})


@app.get("/")
async def page():
    return HTMLResponse(PAGE)


PAGE = """<!doctype html>
<meta charset="utf-8">
<input type="file" accept="image/*">
<p aria-live="polite"></p>
<script>
const said = document.querySelector("p");
document.querySelector("input").onchange = async ({target}) => {
  said.textContent = "";
  // EventSource can't post; fetch can, and its body is a stream.
  const response = await fetch("describe", {method: "POST", body: target.files[0]});
  if (!response.ok) {
    said.textContent = (await response.json()).error;
    return;
  }
  let rest = "";
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
    const events = (rest + part).split("\\n\\n");
    rest = events.pop();
    for (const event of events) {
      const name = /^event: (.*)$/m.exec(event)?.[1];
      const data = JSON.parse(/^data: (.*)$/m.exec(event)?.[1] ?? "null");
      if (name === "chunk") said.textContent += data.chunk;
      if (name === "error") said.textContent += " [" + data.error.message + "]";
    }
  }
};
</script>
"""
