"""A window that writes a caption as it comes, with PySide6's QtAsyncio.

QtAsyncio's event loop has no sockets yet (its create_connection and getaddrinfo raise
NotImplementedError), so the client lives in a loop of asyncio's own, in a thread. The window's
coroutine waits for what runs there, and pieces of text come over as a signal.

python qt_asyncio_window.py photo.jpg
"""

import asyncio
import sys

from anyio.from_thread import BlockingPortal, start_blocking_portal
from PySide6 import QtAsyncio
from PySide6.QtCore import Signal
from PySide6.QtGui import QCloseEvent
from PySide6.QtWidgets import QApplication, QPlainTextEdit, QPushButton, QVBoxLayout, QWidget

import moondream_async as md


class Window(QWidget):
    piece = Signal(str)  # may be emitted in any thread, and arrives in the window's

    def __init__(self, portal: BlockingPortal, client: md.MoondreamClient, path: str) -> None:
        super().__init__()
        self.portal, self.client, self.path = portal, client, path
        self.task: asyncio.Future[None] | None = None
        self.text = QPlainTextEdit(readOnly=True)
        self.piece.connect(self.text.insertPlainText)
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
            await asyncio.wrap_future(self.portal.start_task_soon(self.stream))
        except md.MoondreamError as error:
            self.text.appendPlainText(str(error))
        except asyncio.CancelledError:
            pass  # or QtAsyncio prints it
        finally:
            self.start.setEnabled(True)
            self.cancel.setEnabled(False)

    async def stream(self) -> None:
        """Run in the other loop."""
        async with self.client.caption(self.path, stream=True) as stream:
            async for piece in stream:
                self.piece.emit(piece)

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802 - Qt's name
        self.stop()
        event.accept()


def main(path: str) -> None:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(md.MoondreamClient()) as client,
    ):
        window = Window(portal, client, path)
        window.show()
        QtAsyncio.run()  # until the window is closed


if __name__ == "__main__":
    app = QApplication.instance() or QApplication(sys.argv)
    main(sys.argv[1])
