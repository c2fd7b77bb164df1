"""A terminal app of Textual's that writes a caption as it comes: Enter begins, Escape stops it.

python textual_app.py photo.jpg
"""

import sys

from textual.app import App, ComposeResult
from textual.widgets import Footer, Static

import moondream_async as md


class CaptionApp(App[None]):
    BINDINGS = (
        ("enter", "begin", "Describe"),
        ("escape", "stop", "Stop"),
        ("q", "quit", "Quit"),
    )

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.text = ""

    def compose(self) -> ComposeResult:
        yield Static(id="caption", markup=False)
        yield Footer()

    async def on_mount(self) -> None:
        self.client = md.MoondreamClient()

    async def on_unmount(self) -> None:
        await self.client.aclose()

    def action_begin(self) -> None:
        self.run_worker(self.describe(), exclusive=True)

    def action_stop(self) -> None:
        self.workers.cancel_all()

    async def describe(self) -> None:
        self.text = ""
        caption = self.query_one("#caption", Static)
        try:
            async with self.client.caption(self.path, stream=True) as stream:
                async for piece in stream:
                    self.text += piece
                    caption.update(self.text)
        except md.MoondreamError as error:
            caption.update(f"{self.text}\n{error}")


if __name__ == "__main__":
    CaptionApp(sys.argv[1]).run()
