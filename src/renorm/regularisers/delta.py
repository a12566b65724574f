"""DELTA: what the layers make of an image stays near what the source's made of it, channel by channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import UsageError
from renorm.regularisers.base import Penalty, Regulariser, Start, Step, check_weight, watched
from renorm.sites import device_of, parameters_of, unwrap, walk
from renorm.state import evaluating


@dataclass(frozen=True, kw_only=True)
class Delta(Regulariser):
    """½ weight Σ over stages, samples and channels of a_c C / P ‖f_c(x) − f⁰_c(x)‖², P positions (Li et al. 2019, eq. 4).

    weight      0.01 is the authors' choice; a sum over the batch, so larger batches weigh more
    attention   a_c: softmax over channels of how much the source's loss grows when the channel is silenced, measured on
                `probes` batches with the old head, before training; False: 1 / C each
    probes      batches for that; each costs one forward per channel
    layers      module names whose outputs are compared; () means the last module of each stage of features, within a list
                of modules its last one

    The source is a frozen copy of the model in evaluation: twice the memory of the weights, and one more forward a step.
    With a new head the loss cannot be asked of the source, and channels are weighed by how the features move instead: the
    mean squared change of the last layer's features.
    """

    name: ClassVar[str] = "delta"
    cites: ClassVar[str] = (
        "@inproceedings{li2019delta, title={DELTA: deep learning transfer using feature map with attention for convolutional "
        "networks}, author={Li, Xingjian and Xiong, Haoyi and Wang, Hanchao and Rao, Yuxuan and Liu, Liping and Huan, Jun}, "
        "booktitle={ICLR}, year={2019}}"
    )

    weight: float = 0.01
    attention: bool = True
    probes: int = 1
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_weight(self, "weight")
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 1:
            raise UsageError(f"probes of delta is a number of batches, 1 or more; got {self.probes!r}.")

    @contextmanager
    def over(self, start: Start) -> Iterator[Penalty]:
        names = self._places(start)
        source = deepcopy(unwrap(start.model)).requires_grad_(False)
        for name, parameter in parameters_of(source).items():
            if name in start.state and start.state[name].shape == parameter.shape:
                parameter.data.copy_(start.state[name])
        shares = self._attention(start, source, names) if self.attention else {}
        with watched(start.model, names) as seen, watched(source, names) as held:

            def penalty(step: Step) -> Tensor:
                with evaluating(source):
                    start.caller.run(source, step.batch)
                total = torch.zeros((), device=device_of(start.model))
                for name in names:
                    if name not in seen:
                        raise _uncalled(name)
                    gap = seen[name].float() - held[name].float()
                    gap = gap.reshape(*gap.shape[:2], -1)
                    channels, positions = gap.shape[1:]
                    even = torch.full((channels,), 1 / channels)
                    share = shares.get(name, even).to(gap.device)
                    total = total + (channels / positions * share * gap.square().sum((0, 2))).sum()
                return 0.5 * self.weight * total

            yield penalty

    def _places(self, start: Start) -> list[str]:
        known = dict(walk(unwrap(start.model)))
        names = list(self.layers) or [_called(stage[-1], known) for stage in start.parts.stages if stage[-1]]
        missing = [name for name in names if name not in known]
        if missing or not names:
            raise UsageError(
                f"delta compares the outputs of {missing[0] if missing else 'stages'!r}, and the model has no such module; "
                "name some with layers=."
            )
        return names

    def _attention(self, start: Start, source: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """{layer: (C,) summing to 1}."""
        batches = list(islice(start.passing(asked="delta's attention"), self.probes))
        shares = {}
        with evaluating(source):
            for name in names:
                growth = torch.stack([self._growth(start, source, name, batch) for batch in batches]).mean(0)
                shares[name] = growth.softmax(0).float()
        return shares

    def _growth(self, start: Start, source: nn.Module, name: str, batch: Any) -> Tensor:
        """By how much silencing each channel of layer `name` worsens the source on one batch, (C,)."""
        module = dict(walk(source))[name]
        silenced: list[int] = []
        widths: list[int] = []

        def silence(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            widths.append(output.shape[1])
            return output.index_fill(1, torch.tensor(silenced, dtype=torch.long, device=output.device), 0)

        handle = module.register_forward_hook(silence)
        try:
            whole = self._run(start, source, batch)
            if not widths:
                raise _uncalled(name)
            found = []
            for channel in range(widths[0]):
                silenced[:] = [channel]
                found.append(self._worse(start, whole, self._run(start, source, batch)))
        finally:
            handle.remove()
        return torch.stack(found)

    def _run(self, start: Start, source: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        place = start.parts.head[:1] if start.old_head else ()
        with watched(source, place, inputs=True) as features:
            result = start.caller.run(source, batch)
        seen = next(iter(features.values()), result.logits)
        if seen is None:
            seen = start.caller.logits(result, asked="delta's attention")
        return seen.detach().cpu().double(), result.labels

    def _worse(self, start: Start, whole: tuple[Tensor, Any], part: tuple[Tensor, Any]) -> Tensor:
        if start.old_head or not isinstance(whole[1], Tensor) or whole[1].is_floating_point():
            return (part[0] - whole[0]).square().mean()
        labels = whole[1].long().cpu()
        return F.cross_entropy(part[0], labels) - F.cross_entropy(whole[0], labels)


def _uncalled(name: str) -> UsageError:
    return UsageError(f"delta compares the output of {name!r}, which no forward calls; name others with layers=.")


def _called(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The module of this name, or of a list of modules, which nobody calls, its last one."""
    while isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
        name = f"{name}.{next(reversed(modules[name]._modules))}"
    return name
