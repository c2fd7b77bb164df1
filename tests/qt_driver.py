"""Runs a program with a window, and does what its user would.

    python qt_driver.py PROGRAM ARGUMENT...

Line by line, its standard input says what to do ("click Describe", "close"), and its
standard output tells as JSON what the window shows, each time that it has changed. Both
happen in a timer of Qt's: while the window is stuck, nothing is done and nothing is told.
"""

import json
import os
import runpy
import sys


def main(program):
    from PySide6.QtCore import Qt, QTimer
    from PySide6.QtTest import QTest
    from PySide6.QtWidgets import QApplication, QPlainTextEdit, QPushButton

    told = []

    def tick():
        for window in QApplication.topLevelWidgets():
            buttons = {each.text(): each for each in window.findChildren(QPushButton)}
            shown = {
                "text": window.findChild(QPlainTextEdit).toPlainText(),
                "enabled": [name for name, button in buttons.items() if button.isEnabled()],
            }
            if told[-1:] != [shown]:
                told.append(shown)
                print(json.dumps(shown), flush=True)  # noqa: T201 - a program
            for order in orders():
                if order == "close":
                    window.close()
                else:
                    button = buttons[order.removeprefix("click ")]
                    QTest.mouseClick(button, Qt.MouseButton.LeftButton)

    _app = QApplication([])
    timer = QTimer(interval=5, timeout=tick)
    timer.start()
    runpy.run_path(program, run_name="__main__")


def orders():
    try:
        return os.read(sys.stdin.fileno(), 1024).decode().splitlines()
    except BlockingIOError:
        return []


if __name__ == "__main__":
    os.set_blocking(sys.stdin.fileno(), False)
    sys.argv = sys.argv[1:]
    main(sys.argv[0])
