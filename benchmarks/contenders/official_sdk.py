"""Moondream's own client. It blocks: a thread for each stream, where there are several."""
# ruff: noqa: D101, D102 - the package's docstring says what each has

from concurrent.futures import ThreadPoolExecutor

import moondream
from moondream.types import Base64EncodedImage
from PIL import Image

from . import _same

NAME = "official SDK"
NEEDS = ("moondream",)
BLOCKS = True
TINY = Base64EncodedImage(image_url=_same.TINY_URL)
PICTURE = Base64EncodedImage(image_url=_same.PICTURE_URL)


def open(endpoint, connections):  # noqa: A001, ARG001 - as the others
    return Session(moondream.vl(endpoint=endpoint))


class Session:
    def __init__(self, model):
        self._model = model

    def caption(self, pieces):
        for piece in self._model.caption(TINY, stream=True)["caption"]:
            pieces.append(piece)

    def chat(self, pieces):
        for piece in self._model.chat(_same.MESSAGES, stream=True)["message"]:
            pieces.append(piece)

    def call(self):
        return self._model.caption(PICTURE)["caption"]

    def bulk(self, paths, at_once):
        def one(path):
            with Image.open(path) as picture:
                return self._model.caption(picture)["caption"]

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, paths))
