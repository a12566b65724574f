"""A model on a stream of unlabelled batches: answer, learn, judge, fall back to the source, give the model back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from renorm.calls import map_arrays, map_tensors, read, tensors_in
from renorm.errors import BatchError, UsageError
from renorm.guard import Guard, Verdict, Watch
from renorm.observe import visiting
from renorm.online.base import Online, Subject, rows_of, shaped
from renorm.said import say
from renorm.sites import walk
from renorm.state import Undo, put_

LOGGED = 10_000  # steps that the log keeps


@dataclass(frozen=True, kw_only=True)
class Step:
    """One row of a stream's log.

    samples     in the batch; `left_out` of them held numbers that are not finite, or were garbage, and taught nothing
    believed    whether the answers are the adapted model's, else the source's
    weight      the target's mean share in what normalised
    moved       how far the target lay from the source at the first sites, as `Shift.moved`; NaN where the method is blind to it
    drift       the same at every site that the method measures, by name
    evidence    what the guard has for the adapted model against the source, in [−1, 1]; NaN before the two parted
    confidence  mean largest probability on judged samples: adapted, source; NaN before any
    action      "", "back" (to the last good state) or "anew" (from the source), and `why`
    """

    step: int
    samples: int
    left_out: int
    believed: bool
    weight: float
    moved: float
    drift: Mapping[str, float]
    evidence: float
    confidence: tuple[float, float]
    action: str
    why: str


class Stream:
    """A model under online adaptation: `stream(batch)` gives logits and learns; made by `adapt_`.

    A call that fails changes nothing. Between calls the model holds what the next batch would start from, so that it can be
    evaluated or saved as it stands; `restore_` gives it back as it was before `adapt_`, bit for bit.

    log   a `Step` for each call, the last 10,000 of them
    """

    def __init__(self, subject: Subject, method: Online, guard: Guard | None) -> None:
        self.method: Online = method
        self.log: deque[Step] = deque(maxlen=LOGGED)
        self._subject, self._guard = subject, guard
        touched = {site.name: site.module for site in (*subject.sites, *subject.norms)}
        self._source = _Source(subject)
        self._modules = [module for _, module in walk(subject.model)]
        # with all that holds buffers: observers of a quantisation-aware model move by themselves
        buffered = {name: module for name, module in walk(subject.model) if module._buffers}
        self._undo = Undo("adapt_", buffered | touched, parameters=True)
        try:
            with self._ready(training=False):
                self._running = method.start(subject)
        except BaseException:
            self._undo.restore_()
            raise
        self._watch = Watch(guard) if guard else None
        self._first: dict[str, Tensor] = self._running.state()
        self._good: dict[str, Tensor] | None = None
        self._steps = 0

    def __call__(self, batch: Any) -> Tensor:
        """Logits for the batch, and the stream has learnt from it.

        Samples with numbers that are not finite get NaN. Raises BatchError for a batch without samples; what the model itself
        raises, as for a shape that it cannot take, passes through with a note. The state is then what it was.
        """
        self._refuse_closed()
        batch = map_arrays(batch)
        total = self._samples(batch)
        sound = self._finite(batch, total)
        kept = batch if bool(sound.all()) else _rows(batch, sound.nonzero().flatten(), total)
        if not bool(sound.any()):
            return self._unanswerable(batch, total)
        remembered = None if self._watch is None else self._watch.kept()
        try:
            learnt = self._learnable(kept, int(sound.sum()))
            answer, verdict = self._answered(kept, int(sound.sum()), learnt)
        except BaseException:
            self._running.settle()  # what layers were lent goes with the failure
            if self._watch is not None and remembered is not None:
                self._watch.put_back(remembered)
            raise
        self._steps += 1
        self._act(verdict)
        self._note(total, total - int(learnt.sum()), verdict)
        if answer.shape[0] == total:
            return answer
        whole = torch.full((total, *answer.shape[1:]), torch.nan, dtype=answer.dtype, device=answer.device)
        whole[sound] = answer
        return whole

    def predict(self, batch: Any) -> Tensor:
        """Logits for the batch as the stream would answer now; nothing is learnt and nothing is logged."""
        self._refuse_closed()
        if self._watch is not None and not self._watch.believed:
            return self._by_source(batch)
        return self._whole(batch, self._samples(batch))

    def reset_(self) -> None:
        """Begin the stream anew, from the source: nothing learnt is left but the log."""
        self._refuse_closed()
        self._source.write_()
        with self._ready(training=False):
            self._running = self.method.start(self._subject)
        self._watch = Watch(self._guard) if self._guard else None
        self._good = None

    def restore_(self) -> None:
        """End the stream and give the model back as it was before `adapt_`, bit for bit; a second call does nothing.

        Raises OpenChange where a later change at the same layers still stands.
        """
        self._undo.restore_()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything learnt, as tensors; `load_state_dict` in a new stream of the same model and method goes on from there."""
        found = self._identity() | {f"method.{name}": value for name, value in self._running.state().items()}
        if self._watch is not None:
            found |= {f"guard.{name}": value for name, value in self._watch.state().items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state. Raises UsageError, with the stream as it was, for one of another model, method or guard."""
        self._refuse_closed()
        before = self._running.state()
        remembered = None if self._watch is None else self._watch.kept()
        try:
            for name, value in self._identity().items():
                if not torch.equal(state[name], value):
                    raise ValueError(f"its {name} is another")
            self._running.load(_below("method.", state))
            if self._watch is not None:
                self._watch.load(_below("guard.", state))
        except (KeyError, RuntimeError, ValueError) as error:
            self._running.load(before)
            if self._watch is not None and remembered is not None:
                self._watch.put_back(remembered)
            raise UsageError(
                f"a state was to be loaded into a stream of {self.method.name!r} on this model, and does not fit it: {error}. "
                "Load what state_dict() of such a stream gave."
            ) from error

    def _identity(self) -> dict[str, Tensor]:
        """What a state can be told from one of another method or model by."""
        sites = (*self._subject.sites, *self._subject.norms)
        return {
            "method": torch.tensor(list(self.method.name.encode()), dtype=torch.uint8),
            "channels": torch.tensor([site.channels for site in sites]),
        }

    # ── one step ──

    def _answered(self, batch: Any, samples: int, learnt: Tensor) -> tuple[Tensor, Verdict]:
        """The answer to a batch, of which the samples `learnt` may teach; and what the guard made of it."""
        lesson = _Lesson(batch, samples, learnt)
        if self._watch is None:
            return self._taught(lesson)[1], Verdict(True, float("nan"), "", "")
        return self._trusting(lesson, self._watch) if self._watch.believed else self._doubting(lesson, self._watch)

    def _trusting(self, lesson: _Lesson, watch: Watch) -> tuple[Tensor, Verdict]:
        """The adapted model answers, and the source a few samples, so that belief can end."""
        judged = watch.rows(lesson.count, watch.guard.judged)
        home = self._source_rows(_rows(lesson.batch, judged, lesson.count)) if len(judged) else None
        rows, answer = self._taught(lesson)  # after the source's forward: one that fails has taught nothing
        if lesson.count and not watch.believed:  # another domain has begun in this batch: all of it is evidence
            judged, home = watch.rows(lesson.count, 1.0), self._source_rows(lesson.batch)
        verdict = Verdict(True, watch.evidence, "", "") if home is None else self._judged(watch, rows[judged], home)
        return (answer if verdict.believed else self._by_source(lesson.whole)), verdict

    def _doubting(self, lesson: _Lesson, watch: Watch) -> tuple[Tensor, Verdict]:
        """The source answers, and the method learns from a few samples, so that belief can begin."""
        answer = self._by_source(lesson.whole)
        judged = watch.rows(lesson.count, watch.guard.learning)
        if not len(judged):
            return answer, Verdict(False, watch.evidence, "", "")
        part = _rows(lesson.batch, judged, lesson.count)
        rows, _ = self._learn(part, len(judged))
        home = rows_of(answer, lesson.samples)[lesson.at[judged]]
        verdict = self._judged(watch, rows, home)
        return (self._whole(lesson.whole, lesson.samples) if verdict.believed else answer), verdict

    def _judged(self, watch: Watch, adapted: Tensor, source: Tensor) -> Verdict:
        return watch.judge(adapted, source, moved=self._running.moved, trains=self._running.trains)

    def _taught(self, lesson: _Lesson) -> tuple[Tensor, Tensor]:
        """Rows of class scores of what taught, and the answer to the whole batch."""
        if not lesson.count:
            return torch.zeros(0, 2), self._whole(lesson.whole, lesson.samples)
        rows, logits = self._learn(lesson.batch, lesson.count)
        return rows, logits if lesson.count == lesson.samples else self._whole(lesson.whole, lesson.samples)

    def _learn(self, batch: Any, samples: int) -> tuple[Tensor, Tensor]:
        """The rows of class scores and the logits in full of a batch that the method then learns from."""
        changes = self._running.changes
        with self._ready(training=self._running.trains):
            rows, logits = self._adapted(batch, samples, learn=True)
            self._running.finish(rows)
        if self._running.changes > changes and self._watch is not None:
            self._watch.anew()
        self._running.settle()
        return rows.detach(), logits.detach()

    def _whole(self, batch: Any, samples: int) -> Tensor:
        try:
            with self._ready(training=False):
                return self._adapted(batch, samples, learn=False)[1].detach()
        finally:
            self._running.settle()

    def _adapted(self, batch: Any, samples: int, *, learn: bool) -> tuple[Tensor, Tensor]:
        running, more = self._running, True
        running.begin(samples, batch, learn=learn)
        while more:
            with visiting(self._subject.model, running.places, running.visit):
                rows, logits = self._scored(batch)
            more = learn and running.again(rows.detach())
        answer = running.answer(rows)
        return rows, logits if answer is rows else shaped(answer, rows, logits)

    def _scored(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Rows of class scores, and the logits as the model gives them."""
        subject = self._subject
        result = subject.caller.run(subject.model, batch, index=self._steps)
        logits = subject.caller.logits(result, asked="adapt_")
        rows, known = rows_of(logits, result.samples), subject.source
        if known is not None and rows.shape[1] != len(known.counts):
            raise UsageError(
                f"the profile has {len(known.counts)} classes and the model gives logits of {rows.shape[1]}; "
                "make a profile of this model: renorm.profile(model, source_batches)."
            )
        return rows, logits

    def _by_source(self, batch: Any) -> Tensor:
        """The source's own logits; the model is afterwards what it was."""
        subject = self._subject
        with self._ready(training=False), self._source.standing():
            result = subject.caller.run(subject.model, batch, index=self._steps)
        return subject.caller.logits(result, asked="adapt_").detach()

    def _source_rows(self, batch: Any) -> Tensor:
        return rows_of(self._by_source(batch), self._samples(batch))

    def _act(self, verdict: Verdict) -> None:
        if verdict.action:
            good = self._good if verdict.action == "back" else None
            self._running.load(self._first if good is None else good)
            self._good = None  # if it has to go back once more, then to the source
        elif (
            self._guard is not None
            and self._running.trains
            and verdict.believed
            and self._steps % self._guard.good == 0
        ):
            self._good = self._running.state()

    def _note(self, samples: int, left_out: int, verdict: Verdict) -> None:
        running, nan = self._running, float("nan")
        self.log.append(
            Step(
                step=self._steps,
                samples=samples,
                left_out=left_out,
                weight=running.target_weight,
                moved=running.moved,
                drift=dict(running.drift),
                confidence=(nan, nan) if self._watch is None else self._watch.confidence,
                **verdict._asdict(),
            )
        )

    # ── what a batch is ──

    def _samples(self, batch: Any) -> int:
        forward = self._subject.caller.forward
        samples = read(batch, model=None if forward else self._subject.model).samples
        if samples == 0:
            raise BatchError("a batch of a stream holds no samples; leave empty batches out.")
        return samples

    def _finite(self, batch: Any, total: int) -> Tensor:
        sound = torch.ones(total, dtype=torch.bool)
        for tensor in _inputs(batch, total):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
                sound &= torch.isfinite(tensor).reshape(total, -1).all(1).cpu()
        return sound

    def _learnable(self, batch: Any, samples: int) -> Tensor:
        tensors = [t for t in _inputs(batch, samples) if t.is_floating_point() and t.dim() > 2]
        if self._watch is None or not tensors:
            return torch.ones(samples, dtype=torch.bool)
        return ~self._watch.strangers(tensors[0])

    def _unanswerable(self, batch: Any, total: int) -> Tensor:
        """NaN for every sample of a batch none of which is finite; the log says so."""
        zeros = map_tensors(lambda t: torch.zeros_like(t[:1]) if t.dim() and t.shape[0] == total else t, batch)
        like = self._by_source(zeros)
        self._steps += 1
        self._note(total, total, Verdict(False, float("nan"), "", NOT_A_NUMBER))
        return like.new_full((total, *like.shape[1:]), torch.nan)

    @contextmanager
    def _ready(self, *, training: bool) -> Iterator[None]:
        """Everything in evaluation; gradients only where a method trains, and then only for the norm layers' parameters."""
        active = [module for module in self._modules if module.training]
        flags: list[tuple[Tensor, bool]] = []
        try:
            for module in active:
                module.training = False
            if training:
                wanted = {id(p) for site in self._subject.norms for p in site.affine.values()}
                flags = [(p, p.requires_grad) for p in self._subject.model.parameters() if p.is_floating_point()]
                for parameter, _ in flags:
                    parameter.requires_grad_(id(parameter) in wanted)
            with torch.enable_grad() if training else torch.no_grad():
                yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module in active:
                module.training = True

    def _refuse_closed(self) -> None:
        if not self._undo.is_open:
            raise UsageError("this stream was ended by restore_(); begin another with renorm.adapt_(model).")


class _Lesson:
    """A batch and the part of it that may teach: `at` are its samples' places, `count` their number."""

    def __init__(self, whole: Any, samples: int, learnt: Tensor) -> None:
        self.whole, self.samples = whole, samples
        self.at = learnt.nonzero().flatten()
        self.count = len(self.at)
        self.batch = whole if self.count == samples else _rows(whole, self.at, samples)


NOT_A_NUMBER = say("no sample of the batch was finite: it was answered by NaN, and taught nothing")


class _Source:
    """The source's statistics and affine parameters, to stand in the model for the length of a forward."""

    def __init__(self, subject: Subject) -> None:
        self._statistics = [t for site in subject.sites for t in site.tensors or ()]
        self._parameters = [p for site in subject.norms for p in site.affine.values()]
        self._copies = [t.detach().clone() for t in (*self._statistics, *self._parameters)]

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Inside, the model is the source; afterwards what it was."""
        tensors = (*self._statistics, *self._parameters)
        now = [t.detach().clone() for t in tensors]
        try:
            self.write_()
            yield
        finally:
            put_(tensors, now)

    def write_(self) -> None:
        """Let the model hold the source's statistics, and its parameters."""
        put_((*self._statistics, *self._parameters), self._copies)


def _inputs(batch: Any, samples: int) -> list[Tensor]:
    """The tensors of a batch's inputs that count its samples along their first axis."""
    call = read(batch)
    return [t for t in tensors_in((call.args, call.kwargs)) if t.dim() and t.shape[0] == samples]


def _rows(batch: Any, rows: Tensor, samples: int) -> Any:
    """The batch with these samples alone, labels and all."""
    return map_tensors(lambda t: t[rows.to(t.device)] if t.dim() and t.shape[0] == samples else t, batch)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
