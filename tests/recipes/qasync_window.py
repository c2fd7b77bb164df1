"""A window that writes a caption as it comes, in qasync's event loop: Qt's and asyncio's in one.

python qasync_window.py photo.jpg
"""

import asyncio
import sys

import qasync
from PySide6.QtWidgets import QApplication, QPlainTextEdit, QPushButton, QVBoxLayout, QWidget

import moondream_async as md


class Window(QWidget):
    def __init__(self, client: md.MoondreamClient, path: str) -> None:
        super().__init__()
        self.client, self.path = client, path
        self.task: asyncio.Future[None] | None = None
        self.text = QPlainTextEdit(readOnly=True)
        self.start = QPushButton("Describe", clicked=self.begin)
        self.cancel = QPushButton("Cancel", clicked=self.stop, enabled=False)
        layout = QVBoxLayout(self)
        for widget in (self.text, self.start, self.cancel):
            layout.addWidget(widget)

    def begin(self) -> None:
        self.task = asyncio.ensure_future(self.describe())

    def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()

    async def describe(self) -> None:
        self.text.clear()
        self.start.setEnabled(False)
        self.cancel.setEnabled(True)
        try:
            async with self.client.caption(self.path, stream=True) as stream:
                async for piece in stream:
                    self.text.insertPlainText(piece)
        except md.MoondreamError as error:
            self.text.appendPlainText(str(error))
        finally:
            self.start.setEnabled(True)
            self.cancel.setEnabled(False)


async def main(path: str) -> None:
    closed = asyncio.Event()
    QApplication.instance().lastWindowClosed.connect(closed.set)
    async with md.MoondreamClient() as client:
        window = Window(client, path)
        window.show()
        await closed.wait()
        window.stop()


if __name__ == "__main__":
    app = QApplication.instance() or QApplication(sys.argv)
    app.setQuitOnLastWindowClosed(False)  # main() ends the program, when it has closed the client
    qasync.run(main(sys.argv[1]))
