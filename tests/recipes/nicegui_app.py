"""A caption as it is written, in NiceGUI; a browser that leaves closes the stream.

python nicegui_app.py PORT
"""

import asyncio
import sys

from nicegui import app, ui

import moondream_async as md

client = md.MoondreamClient()  # one for all browsers; it makes its connections when it is used
app.on_shutdown(client.aclose)


@ui.page("/")
def page():
    async def describe(event):
        said.text = ""
        ui.context.client.on_disconnect(asyncio.current_task().cancel)
        picture = await event.file.read()
        try:
            async with client.caption(picture, stream=True) as stream:
                async for piece in stream.chunk:
                    said.text += piece
        except md.MoondreamError as error:
            said.text = str(error)

    ui.upload(label="A picture", on_upload=describe, auto_upload=True)
    said = ui.label().props("aria-live=polite")


if __name__ in {"__main__", "__mp_main__"}:
    ui.run(host="127.0.0.1", port=int(sys.argv[1]), show=False, reload=False)
