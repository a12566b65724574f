"""PerDomain: each sample as its own domain is, domains made and dropped, ids that travel beside the model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from renorm.errors import BatchError, UnknownName, UsageError
from renorm.layers.per_domain import PerDomain, WithDomains
from renorm.observe import observe
from renorm.sites import find_sites
from tests.animals import convs
from tests.layers.catalogue import images, lived
from tests.reference import layers as twin

KEYS = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")


def alone(layer: PerDomain, domain: int) -> nn.BatchNorm2d:
    """A batch norm of torch's with one domain's tensors."""
    norm, tensors = nn.BatchNorm2d(layer.num_features, dtype=layer.running_mean.dtype), layer.domain(domain)
    names = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "tracked"}
    norm.load_state_dict({key: tensors[names.get(key, key)] for key in KEYS})
    return norm


@given(st.lists(st.integers(0, 3), min_size=2, max_size=9))
def test_a_mixed_batch_is_what_a_batch_norm_a_domain_would_make_of_it(ids: list[int]) -> None:
    layer, x = lived("per_domain", domains=4, dtype=torch.float64), images(len(ids), 4, 3, 2, dtype=torch.float64)
    norms = [alone(layer, k) for k in range(4)]
    rows = torch.tensor(ids)
    y = layer(x, rows)
    for k, norm in enumerate(norms):
        if k in ids:
            torch.testing.assert_close(y[rows == k], norm(x[rows == k]))
        after = layer.domain(k)
        for key, part in zip(KEYS, ("mean", "var", "tracked", "weight", "bias"), strict=True):
            torch.testing.assert_close(after[part], getattr(norm, key).detach())
    y = layer.eval()(x, rows)
    for k, norm in enumerate(norms):
        torch.testing.assert_close(y[rows == k], norm.eval()(x[rows == k]))


def test_it_equals_its_twin() -> None:
    layer, x, ids = (
        lived("per_domain", domains=3, dtype=torch.float64),
        images(7, 4, 5, dtype=torch.float64),
        [2, 0, 2, 0, 2, 2, 0],
    )
    weight, bias = (
        torch.cat([getattr(layer, n)[None], getattr(layer.extra, n)]).detach().numpy() for n in ("weight", "bias")
    )
    np.testing.assert_allclose(layer(x, ids).detach().numpy(), twin.per_domain(x.numpy(), ids, weight, bias), rtol=1e-9)


@pytest.mark.parametrize("mode", [True, False])
def test_gradients_of_a_mixed_batch(mode: bool) -> None:
    layer = lived("per_domain", 3, torch.float64, domains=3).train(mode)
    layer.track_running_stats = False
    x = images(6, 3, 2, 2, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([0, 2, 2, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, ids), (x, *layer.parameters()))


def test_a_domain_with_one_value_is_normalised_by_what_it_holds_and_does_not_move() -> None:
    layer, x = lived("per_domain", domains=2), images(4, 4)
    before = layer.domain(1)
    wanted = alone(layer, 1).eval()
    y = layer(x, [0, 0, 0, 1])
    torch.testing.assert_close(
        y[3], nn.functional.batch_norm(x[3:], wanted.running_mean, wanted.running_var, wanted.weight, wanted.bias)[0]
    )
    assert all(torch.equal(before[k], v) for k, v in layer.domain(1).items())


def test_a_domain_that_is_not_finite_is_kept_out_and_the_others_move() -> None:
    layer, x = lived("per_domain", domains=2), images(6, 4, 3, 3)
    x[1, 2, 0, 0] = torch.nan
    before = [layer.domain(k) for k in (0, 1)]
    layer(x, [0, 1, 0, 1, 0, 1])
    assert not torch.equal(before[0]["mean"], layer.domain(0)["mean"])
    assert all(torch.equal(before[1][k], v) for k, v in layer.domain(1).items())
    assert int(layer.skipped) == 1


def test_a_plain_checkpoint_fills_every_domain() -> None:
    layer, norm = PerDomain(4, domains=["day", "night", "dusk"]), lived("batch")
    layer.load_state_dict(norm.state_dict(), strict=True)
    nested = nn.Sequential(nn.Sequential(PerDomain(4, domains=3)))
    nested.load_state_dict(nn.Sequential(nn.Sequential(norm)).state_dict(), strict=True)
    x = images(6, 4, 3, 3)
    for ids in ([0] * 6, [2] * 6, [0, 1, 2, 0, 1, 2]):
        torch.testing.assert_close(layer.eval()(x, ids), copy.deepcopy(norm).eval()(x))
    assert torch.equal(nested[0][0].extra.weight, norm.weight.detach().repeat(2, 1))


def test_domains_are_added_copied_saved_and_dropped() -> None:
    layer, x = lived("per_domain", domains=["day", "night"]).eval(), images(2, 4, 3, 3)
    night = layer(x, ["night", "night"])
    layer.add_("dusk", like="night")
    assert layer.domains == layer.slots() == ("day", "night", "dusk")
    assert torch.equal(layer(x, ["dusk", "dusk"]), night)
    layer.drop_("night")
    assert layer.domains == ("day", "dusk")
    assert torch.equal(layer(x, [1, 1]), night)
    saved = layer.domain("dusk")
    layer.set_("day", saved)
    assert torch.equal(layer(x, ["day", "day"]), night)
    layer.set_("dusk", {k: torch.zeros_like(v) for k, v in saved.items()})
    assert torch.equal(layer.domain(1)["var"], torch.zeros(4))
    assert isinstance(layer.extra.weight, nn.Parameter)


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [
        (lambda layer: layer.add_("day"), UsageError, "has a domain 'day' already; drop it first"),
        (lambda layer: layer.drop_("day"), UsageError, "keeps its first domain, 'day', under torch's own names"),
        (lambda layer: layer.drop_("nigth"), UnknownName, "did you mean 'night'"),
        (lambda layer: layer.domain(2), UnknownName, "there is no set of PerDomain '2'"),
        (lambda layer: PerDomain(4, domains=0), UsageError, "domains is their number, 1 or more, or a list of distinct names"),
        (lambda layer: PerDomain(4, domains=["a", "a"]), UsageError, r"distinct names; got \['a', 'a'\]"),
        (lambda layer: layer(images(3, 4)), UsageError, "has 2 domains and was not told which sample is of which"),
        (lambda layer: layer(images(3, 4), [0, 1]), BatchError, r"ids of shape \(2,\) and type torch\.int64 for 3 samples"),
        (lambda layer: layer(images(3, 4), torch.zeros(3)), BatchError, "type torch.float32 for 3 samples"),
        (lambda layer: layer(images(3, 4), torch.tensor([0, 1, 2])), BatchError, "the id 2; it has 2 sets, .* 0: day, night"),
        (lambda layer: layer(images(3, 4), torch.tensor([0, 1, -1])), BatchError, "the id -1"),
        (lambda layer: layer(images(3, 4), ["day", "day", "noon"]), UnknownName, "there is no set of PerDomain"),
        (lambda layer: WithDomains(nn.Linear(3, 3)), UsageError, "Linear holds no layer to tell domains to"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(act: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        act(PerDomain(4, domains=["day", "night"]))


def net() -> WithDomains:
    torch.manual_seed(0)
    return WithDomains(convs(lived("per_domain", domains=2), lived("per_domain", domains=2)))


def test_ids_travel_beside_the_model_through_copies_pickles_and_checkpoints() -> None:
    model, x, ids = net(), images(6, 3, 5, 5), torch.tensor([0, 1, 1, 0, 1, 0])
    other = copy.deepcopy(model)
    wanted = model(x, domains=ids)
    assert torch.equal(other(x, domains=ids), wanted)
    assert not torch.equal(other(x, domains=1 - ids), wanted)
    again = pickle.loads(pickle.dumps(net()))
    assert torch.equal(again(x, domains=["0" if i == 0 else "1" for i in ids.tolist()]), wanted)
    gradients = []
    for checkpointed in (False, True):
        model = net()
        y = (
            checkpoint(lambda x, m=model: m(x, domains=ids), x, use_reentrant=False)
            if checkpointed
            else model(x, domains=ids)
        )
        y.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_ids_travel_through_compile_and_export() -> None:
    torch._dynamo.reset()
    model, x, ids = net().eval(), images(6, 3, 5, 5), torch.tensor([0, 1, 1, 0, 1, 0])
    wanted = model(x, domains=ids)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, domains=ids), wanted)
    torch.testing.assert_close(compiled(x, domains=1 - ids), model(x, domains=1 - ids))
    exported = torch.export.export(model, (x,), {"domains": ids}).module()
    torch.testing.assert_close(exported(x, domains=1 - ids), model(x, domains=1 - ids))


def test_every_domain_is_a_place_that_is_observed_apart() -> None:
    model, x = net().eval(), images(6, 3, 5, 5)
    ids = torch.tensor([0, 1, 1, 0, 1, 0])
    assert [site.name for site in find_sites(model)] == ["model.1@0", "model.1@1", "model.4@0", "model.4@1"]
    batches: list[dict[str, Tensor]] = [{"x": x, "domains": ids}]
    seen = observe(model, batches, under="running", forward=lambda m, b: m(b["x"], domains=b["domains"]))
    values = model.model[0](x)
    np.testing.assert_allclose(seen["model.1@1"].values.mean, values[ids == 1].mean((0, 2, 3)).detach(), atol=1e-5)
    assert seen["model.1@0"].images.count == 3
    one = observe(model, [x], under="batch", forward=lambda m, b: m(b, domains=["1"] * 6))
    assert one.unvisited == ("model.1@0", "model.4@0")
