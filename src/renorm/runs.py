"""A training run on disk: one folder, one checkpoint that is complete or absent, one process at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from renorm.errors import CheckpointError, Diverged, UsageError
from renorm.files import is_held, lock, no_room, writing
from renorm.log import LOGGER

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Saved:
    """A checkpoint: tensors by name, and everything else as plain values."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


class Run:
    """The folder of one training run, held by this process until `close()`.

    identity   plain values that say which run this is (model, data, options): a checkpoint of another one is refused
    writes     False in all but one of several processes that train together: they only read
    Raises UsageError where the path is no folder or another process holds it; CheckpointError for a checkpoint that is
    damaged or belongs to another run.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], *, writes: bool = True) -> None:
        self.folder: Path = Path(folder)
        self.writes = writes
        self._lock: IO[str] | None = None
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity), default=str))
        if writes:
            self._take()

    def _take(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a")
        except OSError as error:
            raise UsageError(
                f"{self.folder} cannot hold a run: {error.strerror or error}. Give the name of a folder."
            ) from error
        try:
            lock(self._lock)
        except OSError as error:
            if not is_held(error):  # a file system that knows no locks, as some network folders
                LOGGER.warning("%s cannot be locked (%s): start no second run in it", self.folder, error.strerror)
            else:
                self.close()
                raise UsageError(
                    f"another process is training in {self.folder}; let it finish, or give another folder."
                ) from error
        for left in self.folder.glob(f".{Path(CHECKPOINT).stem}.*"):
            left.unlink(missing_ok=True)  # of a process that was killed while it wrote

    @property
    def path(self) -> Path:
        """Where the checkpoint stands."""
        return self.folder / CHECKPOINT

    def load(self) -> Saved | None:
        """The checkpoint; None where there is none yet."""
        if not self.path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt", device="cpu") as opened:
                metadata = opened.metadata() or {}
                # copies: Windows puts no new checkpoint in the place of a file that is still mapped
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}
            known, state = json.loads(metadata["identity"]), json.loads(metadata["state"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is no checkpoint of a run, or damaged ({error}). Remove it to start again."
            ) from error
        other = [key for key in {**known, **self.identity} if known.get(key) != self.identity.get(key)]
        if other:
            was, now = (_short(each.get(other[0])) for each in (known, self.identity))
            more = f" (and {', '.join(other[1:])})" if other[1:] else ""
            raise CheckpointError(
                f"{self.path} belongs to another run: its {other[0]} was {was}, and is {now} now{more}. "
                "Resume with what it was started with, or give another folder."
            )
        return Saved(tensors, state)

    def save(self, saved: Saved) -> None:
        """Put a new checkpoint in the place of the last; where that fails the last one stands.

        Raises Diverged for weights that are not finite, CheckpointError where the disk does not take it.
        """
        from safetensors.torch import save_file

        if not self.writes:
            return
        for name, tensor in saved.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise Diverged(
                    f"{name} holds numbers that are not finite; the checkpoint of before stands. Try a lower lr=."
                )
        metadata = {"identity": json.dumps(self.identity), "state": json.dumps(dict(saved.state), default=str)}
        try:
            with writing(self.path, force=True) as temporary:
                # names may share memory, which safetensors refuses
                save_file(
                    {n: t.detach().cpu().clone().contiguous() for n, t in saved.tensors.items()}, temporary, metadata
                )
        except Exception as error:
            cause = error.__cause__ or error
            if not isinstance(cause, OSError) and not no_room(cause):
                raise
            kept = "The one of before stands" if self.path.exists() else "There is none of before"
            raise CheckpointError(
                f"the checkpoint could not be written to {self.folder}: {cause}. {kept}; make room, and start again to go "
                "on from there."
            ) from error

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


class Unsaved:
    """A run that leaves nothing on disk."""

    def load(self) -> None:
        """Nothing to go on from."""

    def save(self, saved: Saved) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
