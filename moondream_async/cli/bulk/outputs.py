"""What ``-o`` may name: the form of the answers goes by the end of the name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from moondream_async.errors import RequestError

ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".csv": "csv",
    ".csv.gz": "csv.gz",
    ".parquet": "parquet",
    ".coco.json": "coco",
    ".vtt": "vtt",
    ".srt": "srt",
    ".tar": "shards",
}


class Output(NamedTuple):
    """What is to be written.

    >>> Output.of("a.jsonl").journal, Output.of("a.csv").journal
    ('a.jsonl', 'a.csv.jsonl')
    """

    path: str
    form: str

    @classmethod
    def of(cls, path: str) -> Output:
        """Read what ``-o`` says.

        Raises:
            RequestError: Its end says nothing that can be written.
        """
        if path == "-":
            return cls(path, "stdout")
        if path.endswith(("/", os.sep)) or Path(path).is_dir():
            return cls(path, "folder")
        for ending in sorted(ENDINGS, key=len, reverse=True):
            if path.lower().endswith(ending):
                return cls(path, ENDINGS[ending])
        raise RequestError(
            f"'-o {path}': its name must end in {', '.join(ENDINGS)}, or in / for a folder of "
            "texts or boxes; or be - for stdout"
        )

    @property
    def journal(self) -> str:
        """The path of the file of lines, from which the other forms are made."""
        if self.form == "folder":
            return os.path.join(self.path, ".moondream.jsonl")  # noqa: PTH118 - a string stays one
        return self.path if self.form == "jsonl" else f"{self.path}.jsonl"

    @property
    def is_export(self) -> bool:
        """Whether it is one file that is made at the end, from the journal."""
        return self.form not in ("stdout", "folder", "jsonl")

    def check(self, *, overwrite: bool) -> None:
        """Refuse what could not be written, before anything is paid for.

        Raises:
            RequestError: An extra is missing, or the file is somebody else's.
        """
        name = self.path
        if self.form == "parquet":
            from .exports import check_parquet  # noqa: PLC0415 - --help does without

            check_parquet()
        elif self.form == "shards":
            from .shards import check_shards, shard_name  # noqa: PLC0415 - likewise

            check_shards()
            name = shard_name(self.path, 0)
        if overwrite or not self.is_export:
            return
        if Path(name).exists() and not Path(self.journal).exists():
            raise RequestError(
                f"{name} is there already, and no run has made it: name another file, "
                "or say '--overwrite'"
            )
