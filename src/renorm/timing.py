"""Which way of running a model is fastest here: each timed in turns within a budget of seconds, and checked to agree."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from renorm.calls import Caller, read, tensors_in
from renorm.errors import RenormError
from renorm.fold import fold
from renorm.said import Said, say
from renorm.sites import device_of, unwrap

__all__ = ["COMPILING", "Timings", "timed"]

COMPILING = 60.0  # seconds of budget from which torch.compile is tried: it takes that long itself
AGREE = 1e-3  # of the largest output


@dataclass(frozen=True)
class Timings:
    """Median seconds of a forward on one batch, per way; `left_out` says why a way was not timed.

    `first` are the seconds of each way's first call, which is not in the median: there a compiler does its work.
    """

    seconds: Mapping[str, float]
    left_out: Mapping[str, Said]
    samples: int
    rounds: int
    first: Mapping[str, float] = field(default_factory=dict)

    @property
    def fastest(self) -> str:
        """The name of the fastest way."""
        return min(self.seconds, key=lambda name: self.seconds[name])

    @property
    def gain(self) -> float:
        """How many times faster that is than the model as it is."""
        return self.seconds["native"] / self.seconds[self.fastest]


def timed(model: nn.Module, batch: Any, caller: Caller, *, samples: int, budget: float) -> Timings:
    """Time `model` in evaluation as it is, with channels last, folded, both, and compiled where the budget allows.

    Ways take turns, so that a busy machine slows all of them alike. A way whose outputs differ by more than 1e-3 of the
    largest is left out. The model is untouched: every way but the first is a copy.
    """
    start = perf_counter()
    inner = unwrap(model)
    ways: dict[str, Callable[[], Any]] = {}
    left_out: dict[str, Said] = {}
    plain = copy.deepcopy(inner).eval()
    ways["native"] = _run(plain, batch, caller)
    with torch.inference_mode():
        expected = _first(ways["native"]())
    if _has_images(batch):
        ways["channels_last"] = _run(_last(plain), batch, _like(caller, channels_last=True))
    try:
        folded = fold(inner, batch, forward=caller.forward, output=caller.output, device=caller.device).model.eval()
        ways["folded"] = _run(folded, batch, caller)
        if "channels_last" in ways:
            ways["folded, channels_last"] = _run(_last(folded), batch, _like(caller, channels_last=True))
    except RenormError as error:
        left_out["folded"] = say("cannot be folded: {reason}", reason=str(error).partition(".")[0])
    if budget >= COMPILING:
        compiled = copy.deepcopy(plain)
        compiled.compile()  # in place: the wrapper of torch.compile(model) would be taken off before the model is called
        ways["compiled"] = _run(compiled, batch, caller)
    else:
        left_out["compiled"] = say(
            "compiling alone takes about {seconds:.0f} s: give a larger budget", seconds=COMPILING
        )
    first: dict[str, float] = {}
    for name, way in list(ways.items()):
        began = perf_counter()
        why = _checked(way, expected)
        first[name] = perf_counter() - began
        if why is not None:
            del ways[name]
            left_out[name] = why
    spent: dict[str, list[float]] = {name: [] for name in ways}
    while ways and (len(spent["native"]) < 3 or perf_counter() - start < budget) and len(spent["native"]) < 200:
        for name, way in ways.items():
            spent[name].append(_seconds(way, device_of(inner)))
    seconds = {name: statistics.median(values) for name, values in spent.items()}
    return Timings(seconds, left_out, samples, len(spent["native"]), {name: first[name] for name in seconds})


def _run(model: Any, batch: Any, caller: Caller) -> Callable[[], Any]:
    return lambda: caller.run(model, batch).output


def _last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return, unused-ignore]


def _like(caller: Caller, *, channels_last: bool) -> Caller:
    return Caller(**{**vars(caller), "channels_last": channels_last})


def _has_images(batch: Any) -> bool:
    return any(tensor.dim() == 4 for tensor in tensors_in(read(batch).args))


def _first(output: Any) -> Tensor | None:
    found = tensors_in(output)
    return found[0].double() if found else None


def _checked(way: Callable[[], Any], expected: Tensor | None) -> Said | None:
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compilers', about themselves
            got = _first(way())
    except Exception as error:  # a compiler may fail in any way of its own
        return say("does not run: {reason}", reason=str(error).strip().partition("\n")[0][:100] or type(error).__name__)
    if expected is None or got is None:
        return None
    apart = float((got - expected).abs().max()) / max(float(expected.abs().max()), 1e-12)
    return None if apart <= AGREE else say("gives other answers, by {apart:.1e} of the largest", apart=apart)


def _seconds(way: Callable[[], Any], device: torch.device) -> float:
    with torch.inference_mode():
        _settle(device)
        start = perf_counter()
        way()
        _settle(device)
        return perf_counter() - start


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
