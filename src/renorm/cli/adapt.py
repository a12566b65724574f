"""`renorm adapt MODEL DATA -o OUT`."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from renorm.cli.base import argument, option
from renorm.cli.subject import DATA, OnModel, notes
from renorm.errors import DataError, UnknownName, UsageError
from renorm.said import listed, say

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from renorm.cli.incoming import Part, Paths
    from renorm.cli.predictions import Put, Row
    from renorm.cli.screen import Screen
    from renorm.datasets.base import Dataset
    from renorm.guard import Guard
    from renorm.models import Model
    from renorm.report.base import Report
    from renorm.report.stream import Errors, Streamed
    from renorm.stream import Stream

INTERRUPTED = 130
SHOWN = 3  # skipped lines that a note names


@dataclass(frozen=True, kw_only=True)
class Adapt(OnModel):
    """Answer a stream of unlabelled samples, and keep the model fitting it, with a guard that falls back to the source.

    Samples are read as they stand in the data: the order of a stream matters. With - as DATA, paths of images come on
    standard input, one a line; a line that names no image is skipped and counted. Ctrl-C ends the stream: what was answered
    is written, with exit code 130. Any failure writes nothing. Exit code 0: the adapted model is believed at the end; 1: the
    guard trusts the source more.
    """

    name: ClassVar[str] = "adapt"
    family: ClassVar[str] = "online"
    example: ClassVar[str] = (
        "renorm adapt nets.py:resnet20 --checkpoint resnet20.safetensors photos/ -o predictions.csv"
    )

    data: str = argument(f"{DATA}; or - for paths on standard input")
    output: str = option(
        "", "the predictions to write: .parquet, .csv or .jsonl", short="-o", metavar="OUT", required=True
    )
    method: str = option("shrink", "how to adapt: shrink, ema, tent …; its options: --options.NAME", metavar="NAME")
    source: str = option("", "a profile of the source, made by renorm profile", metavar="FILE")
    no_guard: bool = option(False, "every answer is the adapted model's, however unsure it becomes")
    guard: Mapping[str, float] = field(
        default_factory=dict,
        metadata={"help": "the guard's settings, as in --guard.first 64", "metavar": "NUMBER"},
    )
    state: str = option(
        "", "go on from this .safetensors where it exists, and write what was learnt there", metavar="FILE"
    )
    shuffle: bool = option(False, "read in a random order of --seed, not as the data stand")
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, screen: Screen) -> Report:
        from renorm.adapt import adapt_
        from renorm.cli.incoming import stopping
        from renorm.cli.predictions import writable, written
        from renorm.provenance import fingerprint
        from renorm.report import stream as page
        from renorm.report.base import Report

        target = writable(self.output, force=self.force)
        kept = _kept(self.state)
        model = self.opened()
        dataset = None if self.data == "-" else self.dataset(self.data, model, in_order=not self.shuffle)
        paths = self._paths(model) if dataset is None else None
        origin = fingerprint(model.module)
        labelled = dataset is not None and _are_classes(dataset.labels)
        how = self.calling()
        home = adapt_(copy.deepcopy(model.module), "source", guard=False, **how) if labelled else None
        stream = adapt_(model.module, self.method, self.source or None, guard=self._guard(), **how, **self.options)
        if kept is not None and kept.exists():
            stream.load_state_dict(_loaded(kept, method=self.method, model=origin))
        answering = _Answering(stream, home, model, dataset)
        total = dataset.count if dataset else 0
        with (
            written(target, force=self.force) as put,
            stopping() as stop,
            screen.progress(f"adapting ({self.method})", total=total) as drawn,
        ):
            for part in stop.until(self._parts(dataset, paths)):
                answering.answer(part, put)
                drawn(len(part.indices), _who(stream))
            interrupted = stop.asked
            self._refuse_nothing(answering, paths, interrupted=interrupted)
            if kept is not None:
                _save(stream, kept, method=self.method, model=origin)
        streamed = answering.streamed(method=self.method, guarded=not self.no_guard, interrupted=interrupted)
        code = INTERRUPTED if interrupted else int(not streamed.believed)
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=page.verdict(streamed, output=self.output),
            blocks=page.blocks(streamed),
            result=page.result(streamed)
            | {"output": self.output, "state": self.state or None, "skipped": _skipped(paths)},
            notes=(*answering.notes, *_skips(paths), *notes(model, dataset)),
            origin=self.origin_of(model, dataset, fingerprinted=origin),
            exit_code=code,
        )

    def _guard(self) -> Guard | bool:
        """The guard as it was asked for."""
        from renorm.guard import Guard

        if self.no_guard and self.guard:
            raise UsageError("--no-guard leaves nothing for --guard to set; give one of the two.")
        usual = vars(Guard())
        for name in self.guard:
            if name not in usual:
                raise UnknownName("setting of the guard", name, usual)
        return False if self.no_guard else Guard(**{name: type(usual[name])(self.guard[name]) for name in self.guard})

    def _paths(self, model: Model) -> Paths:
        from renorm.cli.incoming import Paths, standard_input
        from renorm.datasets.base import Options
        from renorm.datasets.images import Decoder

        size = Options(batch_size=self.batch_size).batch_size  # which refuses one below 1
        lines: Iterable[str] = standard_input()
        if self.limit is not None:
            from itertools import islice

            lines = islice(lines, self.limit)
        return Paths(lines, Decoder(model.preprocessing), size)

    def _parts(self, dataset: Dataset | None, paths: Paths | None) -> Iterator[Part]:
        from renorm.cli.incoming import of_dataset

        if dataset is not None:
            return of_dataset(dataset)
        assert paths is not None
        return iter(paths)

    def _refuse_nothing(self, answering: _Answering, paths: Paths | None, *, interrupted: bool) -> None:
        if answering.samples:
            return
        if interrupted:
            signal.default_int_handler(signal.SIGINT, None)
        first = f" The first one: {paths.reasons[0][2]}" if paths and paths.reasons else ""
        raise DataError(
            f"standard input named no image that could be read, and nothing was written.{first} Send one path a line."
        )


class _Answering:
    """A stream at work: what it was given, what it said, and how often it and the source were right."""

    def __init__(self, stream: Stream, home: Stream | None, model: Model, dataset: Dataset | None) -> None:
        self.samples: int = 0
        self.unanswered: int = 0
        self.notes: tuple[str, ...] = ()
        self._stream, self._home = stream, home
        self._classes = model.classes or (dataset.classes if dataset else None)
        self._wrong: list[tuple[Tensor, Tensor]] = []  # by step: the stream, the source

    def answer(self, part: Part, put: Put) -> None:
        """Answer a batch, write its rows, and learn from it."""
        from renorm.online.base import rows_of

        batch = (part.inputs,)
        logits = self._stream(batch)
        if logits.dim() > 2:
            raise UsageError(
                f"renorm adapt writes one class per sample, and the model gives {tuple(logits.shape)} for a batch of "
                f"{len(part.indices)}: scores at positions. Use renorm.adapt_ from Python, whose answers are the logits."
            )
        scores = rows_of(logits, len(part.indices)).detach().float().cpu()
        put(self._rows(part, scores))
        self.samples += len(part.indices)
        if self._home is not None and part.labels is not None:
            if int(part.labels.max()) >= scores.shape[1] or int(part.labels.min()) < 0:
                self._home = None
                self._wrong.clear()
                self.notes = (
                    say(
                        "no error was counted: there are labels other than the model's classes 0 to {last}",
                        last=scores.shape[1] - 1,
                    ),
                )
                return
            source = rows_of(self._home(batch), len(part.indices)).cpu()
            wrong = [(rows.argmax(1) != part.labels) | rows.isnan().any(1) for rows in (scores, source)]
            self._wrong.append((wrong[0], wrong[1]))

    def _rows(self, part: Part, scores: Tensor) -> list[Row]:
        from renorm.cli.predictions import Row, rounded

        step = self._stream.log[-1]
        confidence, chosen = scores.softmax(1).max(1)
        names = self._classes if self._classes and len(self._classes) == scores.shape[1] else None
        rows = []
        for index, path, share, place in zip(
            part.indices, part.names, confidence.tolist(), chosen.tolist(), strict=True
        ):
            sure = rounded(share)
            found = None if sure is None else place
            self.unanswered += sure is None
            name = None if names is None or found is None else names[found]
            rows.append(Row(index, path, found, name, sure, step.believed, step.step))
        return rows

    def streamed(self, *, method: str, guarded: bool, interrupted: bool) -> Streamed:
        """All of it, as a value."""
        from renorm.report.stream import Streamed

        return Streamed(
            method=method,
            guarded=guarded,
            interrupted=interrupted,
            samples=self.samples,
            unanswered=self.unanswered,
            steps=self._stream.log[-1].step,
            log=tuple(self._stream.log),
            errors=_errors(self._wrong) if self._wrong else None,
        )


def _who(stream: Stream) -> str:
    return "adapted" if stream.log[-1].believed else "the source answers"


def _errors(wrong: Sequence[tuple[Tensor, Tensor]]) -> Errors:
    import torch

    from renorm.bench.intervals import paired
    from renorm.report.stream import Errors

    stream, source = (torch.cat(list(each)).double() for each in zip(*wrong, strict=True))
    difference = paired((stream - source).tolist())
    return Errors(
        stream=float(stream.mean()),
        source=float(source.mean()),
        difference=(difference.mean, difference.low, difference.high),
        samples=len(stream),
        by_step=tuple((float(ours.double().mean()), float(theirs.double().mean())) for ours, theirs in wrong),
    )


def _are_classes(labels: Tensor | None) -> bool:
    return labels is not None and labels.dim() == 1 and not labels.is_floating_point()


def _skipped(paths: Paths | None) -> dict[str, Any]:
    if paths is None:
        return {"count": 0, "first": []}
    first = [{"line": line, "path": path, "why": why} for line, path, why in paths.reasons]
    return {"count": paths.skipped, "first": first}


def _skips(paths: Paths | None) -> tuple[str, ...]:
    if paths is None or not paths.skipped:
        return ()
    shown = listed(f"{line + 1} ({path})" for line, path, _ in paths.reasons[:SHOWN])
    more = say("{names} …", names=shown) if paths.skipped > SHOWN else shown
    return (
        say(
            "skipped {count} lines of standard input that name no image that can be read: line {names}",
            count=paths.skipped,
            names=more,
        ),
    )


# ── what was learnt, in a file ──


def _kept(state: str) -> Path | None:
    """The file of the state, if one was named that can be written."""

    from renorm.files import refuse_existing

    if not state:
        return None
    if not state.endswith(".safetensors"):
        raise UsageError(f"--state is a .safetensors file; got {state}. Give it that suffix.")
    return refuse_existing(state, force=True)  # it is there to be written over


def _loaded(path: Path, *, method: str, model: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            told = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"the state {path} cannot be read ({error}). Remove it to begin anew.") from error
    for what, own in (("method", method), ("model", model)):
        if told.get(what) != own:
            raise UsageError(
                f"the state {path} was learnt with another {what} ({told.get(what, 'unknown')}, here {own}). "
                "Give another --state, or remove the file to begin anew."
            )
    return state


def _save(stream: Stream, path: Path, *, method: str, model: str) -> None:
    from safetensors.torch import save_file

    from renorm.files import writing

    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in stream.state_dict().items()}
    with writing(path, force=True) as temporary:
        save_file(tensors, temporary, {"method": method, "model": model})
