"""The folder of a run: its lock, the names of its checkpoints, its JSON files and curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alexnet_mp.config.files import remove_leftovers, write_atomically
from alexnet_mp.config.folder_lock import LOCK_NAME, FolderLock


class RunFolder:
    """The folder that --out names. Only rank 0 reads and writes in it; others use its names.

    Every file is replaced as a whole: no reader finds half of one, even after a kill.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last, self.best = path / "last.pt", path / "best.pt"
        self._lock = FolderLock(path)

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The checkpoint of one epoch, counted from 1, which `--keep-checkpoints` asks for."""
        return self.path / f"epoch-{epoch:04}.pt"

    def open(self, config_json: dict[str, Any], resumed: bool) -> None:
        """Makes the folder, locks it and writes config.json.

        Raises ValueError that names --out where the folder cannot be made or written, where another
        run writes into it, or where a run that is not `resumed` would replace another one's files.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            remove_leftovers(self.path)
            if not resumed and self.last.exists():
                raise OSError(
                    "holds another run's last.pt; continue that one with --resume, or name another "
                    "folder"
                )
            self._write_json("config.json", config_json)
        except OSError as error:
            raise ValueError(f"--out {self.path}: {error.strerror or error}") from None

    def release(self) -> None:
        """Lets another run write into the folder. A second call does nothing."""
        self._lock.release()

    def write_history(self, records: list[dict[str, Any]]) -> None:
        """Writes history.jsonl: one line an epoch."""
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(self.path / "history.jsonl", lines)

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes result.json."""
        self._write_json("result.json", result)

    def draw_curves(self, records: list[dict[str, Any]], classes: int) -> str:
        """Draws curves.png. Returns why that failed, or "": without a picture the run goes on."""
        try:
            from alexnet_mp.plotting.curves import draw_curves  # matplotlib may be broken

            draw_curves(records, self.path / "curves.png", classes=classes)
        except Exception as error:  # of any kind
            return f"curves.png could not be drawn: {error}"
        return ""

    def file_names(self) -> list[str]:
        """The names of the files in the folder, without the lock."""
        return sorted(path.name for path in self.path.iterdir() if path.name != LOCK_NAME)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(content, indent=1) + "\n")
