"""provenance: one model has one fingerprint however it is wrapped, and any change of it has another."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
import torch
from torch import Tensor, nn

from renorm.provenance import fingerprint, plain_names, plain_state, provenance, version


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def test_a_wrapped_model_has_the_fingerprint_of_the_bare_one() -> None:
    model = small()
    bare = fingerprint(model)
    assert len(bare) == 64
    assert fingerprint(model.state_dict()) == bare
    assert fingerprint(nn.DataParallel(model)) == bare
    assert fingerprint(torch.compile(model)) == bare  # type: ignore[arg-type]
    assert fingerprint({f"module.{name}": value for name, value in model.state_dict().items()}) == bare
    assert fingerprint(dict(reversed(model.state_dict().items()))) == bare


@pytest.mark.parametrize("change", ["value", "counter", "name", "shape", "dtype"])
def test_any_change_shows_in_the_fingerprint(change: str) -> None:
    state = {"a": torch.zeros(2, 3), "n": torch.tensor(0)}
    changed: dict[str, dict[str, Tensor]] = {
        "value": {"a": torch.tensor([[0, 0, 0], [0, 0, 1e-30]])},
        "counter": {"n": torch.tensor(1)},
        "name": {"b": state["a"]},
        "shape": {"a": torch.zeros(3, 2)},
        "dtype": {"a": torch.zeros(2, 3, dtype=torch.int32)},
    }
    other = {**state, **changed[change]}
    if change == "name":
        del other["a"]
    assert fingerprint(other) != fingerprint(state)


def test_every_dtype_and_layout_has_a_fingerprint() -> None:
    state = {"bf16": torch.ones(2, dtype=torch.bfloat16), "scalar": torch.tensor(True), "empty": torch.empty(0)}
    assert fingerprint(state) == fingerprint({name: value.clone() for name, value in state.items()})
    square = torch.arange(4.0).reshape(2, 2)
    assert fingerprint({"a": square.t()}) == fingerprint({"a": square.t().contiguous()})


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        (["module.a", "module.b"], ["a", "b"]),
        (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
        (["model.module.a", "model.module.b"], ["a", "b"]),
        (["module.a", "b"], ["module.a", "b"]),
        (["layer._orig_mod.a"], ["layer.a"]),
        (["n_averaged", "module.a"], ["a"]),
        (["modules.a"], ["modules.a"]),
        ([], []),
    ],
)
def test_plain_names(names: list[str], plain: list[str]) -> None:
    assert list(plain_names(dict.fromkeys(names))) == plain


def test_a_model_whose_own_parts_are_called_model_keeps_their_names() -> None:
    net = nn.Module()
    net.model = nn.Linear(1, 1)
    assert list(plain_state(net)) == ["model.weight", "model.bias"]


def test_provenance_is_plain_values_with_the_time_in_utc() -> None:
    origin = provenance(command="renorm recalibrate", model="m", data="d", checkpoint="c", prior="auto")
    assert json.loads(json.dumps(origin)) == origin
    assert origin["torch"] == torch.__version__
    assert {"command": "renorm recalibrate", "model": "m", "data": "d", "checkpoint": "c", "prior": "auto"}.items() <= (
        origin.items()
    )
    created = datetime.fromisoformat(origin["created"])
    assert created.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - created) < timedelta(minutes=1)


def test_version_of_what_is_not_installed() -> None:
    assert torch.__version__.startswith(version("torch"))
    assert version("no-such-package") == "source"
