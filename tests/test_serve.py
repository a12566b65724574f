"""One forward for samples of several domains: each is answered as the model with its own adapter answers it alone."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm import serve
from renorm.adapters import load_adapter_, save_adapter
from renorm.errors import BatchError, CheckpointError, UnknownName, UsageError
from renorm.heads import new_head_
from renorm.serve import serve_adapters
from renorm.sites import find_sites, parameters_of
from renorm.split import split
from tests import zoo
from tests.contracts.photograph import differences, photograph
from tests.test_finetune import net

DOMAINS = ("north", "south", "east")
SAME = {"rtol": 1e-5, "atol": 1e-5}
REFUSED = {"no-statistics": "no statistics, so that samples would mix"}
REFUSED |= dict.fromkeys(("slots", "bn-lstm", "bn-gru"), "several sets of statistics already")
TUNED = [
    p
    for p in zoo.cases(without=("lazy", "keras", "compiled", "group"))
    if p.id not in ("no-norm", "quantisation-aware")
]


def tune_(model: nn.Module, seed: int) -> None:
    """Let norm layers and head hold something else, as fine-tuning would."""
    generator = torch.Generator().manual_seed(seed)
    parts = split(model)
    with torch.no_grad():
        for site in find_sites(model):
            for tensor in (*site.affine.values(), *(site.tensors or ())):
                tensor.add_(torch.rand(tensor.shape, generator=generator).to(tensor))
        for name, parameter in parameters_of(model).items():
            if parts.is_head(name):
                parameter.add_(torch.rand(parameter.shape, generator=generator).to(parameter))


def files(build: Callable[[], nn.Module], folder: Path, classes: dict[str, int] | None = None) -> dict[str, str]:
    """An adapter for each domain, with a head for so many classes."""
    found = {}
    for seed, domain in enumerate(DOMAINS):
        tuned = build()
        if classes:
            torch.manual_seed(seed)
            new_head_(tuned, split(tuned), classes[domain])
        tune_(tuned, seed)
        found[domain] = str(folder / f"{domain}.safetensors")
        save_adapter(tuned, found[domain])
    return found


def alone(build: Callable[[], nn.Module], path: str, x: Any) -> Any:
    model = build().eval()
    load_adapter_(model, path)
    with torch.no_grad():
        return model(x)


def served(model: nn.Module, adapters: dict[str, str], x: Tensor, domains: Any, **options: Any) -> Any:
    with torch.no_grad():
        return serve_adapters(model, adapters, **options)(x, domains=domains)


@pytest.mark.parametrize("case", TUNED)
def test_every_model_of_the_zoo_answers_each_sample_as_with_its_own_adapter(case: zoo.Case, tmp_path: Path) -> None:
    if case.forward is not None or not isinstance(case.batch(6), Tensor):
        pytest.skip("called in a way of its own")
    model, x = case.build(), case.batch(6)
    adapters = files(case.build, tmp_path)
    before = photograph(model)
    domains = ["east", "north", "east", "south", "north", "north"]
    if case.name in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[case.name]):
            serve_adapters(model, adapters)
        assert differences(before, photograph(model)) == []
        return
    together = serve_adapters(model, adapters)
    with torch.no_grad():
        y = together(x, domains=domains)
    for i, domain in enumerate(domains):
        wanted = alone(case.build, adapters[domain], x[i : i + 1])
        wanted, got = (case.output(v) if case.output else v for v in (wanted, y))
        digits = max(1e-5, 4 * torch.finfo(wanted.dtype).eps)
        scale = {"rtol": digits, "atol": digits * (1 + float(wanted.detach().abs().max()))}
        torch.testing.assert_close(got[i], wanted[0], **scale)
    assert differences(before, photograph(model)) == []


class Tokens(nn.Module):
    """A transformer's parts: layer norms over the last dimension, one of them gemma's, and an image norm with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(6), OnePlus(6), nn.GroupNorm(3, 3)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm2(self.mix(self.norm1(self.norm3(x)))).mean(1))


class OnePlus(nn.Module):
    """An rms norm whose weight is what is added to one: no scale and shift by its own weight alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


OnePlus.__name__ = "GemmaRMSNorm"


def tokens() -> nn.Module:
    torch.manual_seed(0)
    return Tokens().eval()


def test_norms_that_are_no_plain_scale_and_shift_go_the_general_way(tmp_path: Path) -> None:
    adapters, x = files(tokens, tmp_path), torch.randn(4, 3, 6)
    together = serve_adapters(tokens(), adapters)
    kinds = {name: type(module).__name__ for name, module in together.model.named_children() if "norm" in name}
    assert kinds == {"norm1": "_Affine", "norm2": "_Mapped", "norm3": "_Affine"}
    domains = ["south", "south", "north", "east"]
    y = together(x, domains=domains)
    for i, domain in enumerate(domains):
        torch.testing.assert_close(y[i], alone(tokens, adapters[domain], x[i : i + 1])[0], **SAME)


@pytest.mark.parametrize("numbers", [0, 1 << 22])
@pytest.mark.parametrize("convolution", [False, True])
def test_domains_with_other_classes_give_a_list(
    numbers: int, convolution: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> nn.Module:
        if not convolution:
            return net()
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(features=net()[:6], head=nn.Conv2d(4, 3, 1)))

    monkeypatch.setattr(serve, "FEW_NUMBERS", numbers)
    classes = {"north": 2, "south": 5, "east": 3}
    adapters, x = files(build, tmp_path, classes), torch.randn(5, 3, 8, 8)
    domains = ["south", "north", "north", "east", "south"]
    y = served(build(), adapters, x, domains)
    assert [len(each) for each in y] == [5, 2, 2, 3, 5]
    for i, domain in enumerate(domains):
        torch.testing.assert_close(y[i], alone(build, adapters[domain], x[i : i + 1])[0], **SAME)
    together = serve_adapters(build(), adapters)
    assert together.classes == classes
    assert together.domains == DOMAINS


def test_which_part_is_the_logits_is_asked_only_where_classes_differ(tmp_path: Path) -> None:
    class Told(nn.Sequential):
        def forward(self, input: Tensor) -> Any:
            return {"features": input, "answers": super().forward(input)}

    def build() -> nn.Module:
        return Told(*net())

    x, domains = torch.randn(2, 3, 8, 8), ["north", "south"]
    (tmp_path / "same").mkdir()
    assert set(served(build(), files(build, tmp_path / "same"), x, domains)) == {"features", "answers"}
    adapters = files(build, tmp_path, {"north": 2, "south": 4, "east": 2})
    with pytest.raises(UsageError, match="serving domains that differ in classes needs the model's logits"):
        served(build(), adapters, x, domains)
    assert [len(y) for y in served(build(), adapters, x, domains, output="answers")] == [2, 4]


def test_names_or_their_places_compiled_or_not(tmp_path: Path) -> None:
    adapters, x = files(net, tmp_path), torch.randn(4, 3, 8, 8)
    together = serve_adapters(net(), adapters).train()
    assert not any(module.training for module in together.modules())
    domains = ["east", "east", "north", "south"]
    with torch.no_grad():
        y = together(x, domains=domains)
        assert torch.equal(together(x, domains=together.ids(domains)), y)
        compiled = torch.compile(together, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, domains=together.ids(domains)), y, **SAME)
        torch.testing.assert_close(
            compiled(x, domains=together.ids(domains[::-1])), together(x, domains=domains[::-1]), **SAME
        )
    copied = copy.deepcopy(together)
    assert torch.equal(copied(x, domains=domains), y)


def test_weights_are_shared_and_the_model_is_what_it_was(tmp_path: Path) -> None:
    model = net()
    before, keys = photograph(model), list(model.state_dict())
    together = serve_adapters(model, files(net, tmp_path))
    assert together.model[0].weight is model[0].weight
    assert list(model.state_dict()) == keys
    assert differences(before, photograph(model)) == []


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path) -> None:
    adapters, x = files(net, tmp_path), torch.randn(2, 3, 8, 8)
    together = serve_adapters(net(), adapters)
    with pytest.raises(UnknownName, match="west"):
        together(x, domains=["north", "west"])
    with pytest.raises(BatchError, match="a batch of 2 samples came with 1 domains"):
        together(x, domains=["north"])
    with pytest.raises(BatchError, match="a batch of 0 samples came with 0 domains"):
        together(x[:0], domains=[])
    with pytest.raises(UsageError, match="was given no adapters"):
        serve_adapters(net(), {})
    other = net()
    nn.init.zeros_(other[0].bias)
    before = photograph(other)
    with pytest.raises(CheckpointError, match="was made for another base"):
        serve_adapters(other, adapters)
    assert differences(before, photograph(other)) == []
    save_adapter(tokens(), tmp_path / "tokens.safetensors", head="mix")
    save_adapter(tokens(), tmp_path / "head.safetensors")
    with pytest.raises(UsageError, match="has its head at"):
        serve_adapters(tokens(), {"a": tmp_path / "head.safetensors", "b": tmp_path / "tokens.safetensors"})


def test_rows_that_belong_to_no_sample_are_refused(tmp_path: Path) -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x.flatten(0, 1)).view_as(x).mean(1))

    base = Patches()
    save_adapter(base, tmp_path / "base.safetensors")
    with pytest.raises(BatchError, match=r"'norm' was given a tensor of shape \(6, 4\) for a batch of 2 samples"):
        serve_adapters(base, {"a": tmp_path / "base.safetensors"})(torch.randn(2, 3, 4), domains=["a", "a"])


def test_layers_whose_samples_mix_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(144, 2)
    )
    save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="the layer at '1' holds no statistics, so that samples would mix"):
        serve_adapters(model, {"a": tmp_path / "a.safetensors"})
