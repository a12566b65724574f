"""calls: every common form of batch becomes a call without its labels, every common form of output gives its logits."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from renorm.calls import Caller, map_tensors, nonempty, read, several_passes, tensors_in
from renorm.errors import BatchError, OneShot, UsageError
from tests import animals, zoo
from tests.contracts.photograph import process

X = torch.arange(24.0).reshape(2, 3, 4)
Y = torch.tensor([0, 1])


class Plain(nn.Module):
    """Returns what it was called with."""

    def forward(self, x: Tensor) -> Any:
        return x


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


class Named(nn.Module):
    def forward(self, pixels: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        assert labels is None, "labels reached an unlabelled forward"
        return pixels


@dataclasses.dataclass
class Item:
    pixels: Tensor
    labels: Tensor
    mask: Tensor | None = None


class Pair(NamedTuple):
    pixels: Tensor
    target: Tensor


class Graphs:
    """An object that only its model understands, as graph libraries have."""

    num_graphs = 5
    y = Y


# ── reading a batch ──


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X,),
        [X],
        (X, Y),
        [X, Y],
        (X, Y, ["paths"]),
        {"pixels": X, "labels": Y},
        {"pixels": X},
        {"pixels": X, "target": Y, "path": ["a", "b"]},
        ({"pixels": X}, Y),
        Item(X, Y),
        Pair(X, Y),
        X.numpy(),
        (X.numpy(), Y.numpy()),
        {"image": X, "label": Y},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_every_form_of_batch_calls_the_model_with_its_inputs_and_without_its_labels(batch: Any) -> None:
    result = Caller().run(Named(), batch)
    assert torch.equal(result.output, X)
    assert result.samples == 2
    if result.labels is not None:
        assert torch.equal(result.labels, Y)


@pytest.mark.parametrize("name", ["labels", "label", "targets", "target", "y"])
def test_labels_ride_under_every_name_they_have(name: str) -> None:
    call = read({"pixels": X, name: Y}, model=Named())
    assert call.labels is Y
    assert call.kwargs == {"pixels": X}


def test_a_dict_batch_is_not_changed() -> None:
    batch = {"pixels": X, "labels": Y}
    read(batch, model=Named())
    assert set(batch) == {"pixels", "labels"}


def test_a_model_that_takes_anything_gets_every_entry_but_the_labels() -> None:
    call = read({"a": X, "b": Y, "labels": Y}, model=Anything())
    assert set(call.kwargs) == {"a", "b"}


def test_two_inputs_in_a_tuple_are_two_arguments_where_forward_takes_two() -> None:
    assert len(read(((X, X), Y), model=animals.TwoInputs()).args) == 2
    assert len(read(([X, X], Y), model=animals.TwoInputs()).args) == 2  # loaders make lists of tuples
    assert len(read(([X, X], Y), model=Plain()).args) == 1  # detectors take one list
    assert read(([X, X, X], Y), model=Plain()).samples == 3


def test_two_inputs_by_name() -> None:
    case = zoo.named("two-inputs-by-name")
    result = Caller().run(case.build(), case.batch(5) | {"labels": torch.zeros(5)})
    assert result.samples == 5
    assert result.labels.shape == (5,)


def test_an_object_that_only_the_model_understands_is_passed_on() -> None:
    call = read(Graphs(), model=Plain())
    assert isinstance(call.args[0], Graphs)
    assert (call.samples, call.labels is Y) == (5, True)


def test_arrays_share_their_memory_with_the_tensors_they_become() -> None:
    array = np.zeros((2, 3), dtype=np.float32)
    read(array).args[0].add_(1)
    assert array.sum() == 6
    frozen = np.zeros((2, 3))
    frozen.flags.writeable = False
    read(frozen).args[0].add_(1)
    assert frozen.sum() == 0


@pytest.mark.parametrize("batch", [(), []])
def test_an_empty_tuple_is_refused(batch: Any) -> None:
    with pytest.raises(BatchError, match="an empty tuple was found"):
        read(batch)


@pytest.mark.parametrize("batch", ["text", 3, None, ({"a": "b"}, Y)], ids=str)
def test_a_batch_without_tensors_is_refused_with_what_it_is(batch: Any) -> None:
    with pytest.raises(BatchError, match=r"holds no tensor to pass to the model"):
        read(batch)


def test_names_that_the_model_does_not_know_are_refused_with_both_lists() -> None:
    with pytest.raises(
        BatchError, match=r"'image', 'depth' was to be passed to a model whose forward takes x; .*forward="
    ):
        read({"image": X, "depth": X}, model=Plain())


# ── running ──


def test_a_callable_decides_how_to_call() -> None:
    case = zoo.named("takes-a-dict")
    result = Caller(forward=lambda model, batch: model(batch)).run(case.build(), case.batch(5))
    assert result.samples == 5
    assert result.logits is not None


def test_a_wrapped_model_is_run_inside_its_wrapper() -> None:
    for name in ("data-parallel", "averaged", "compiled-warm"):
        case = zoo.named(name)
        model = case.build()
        torch.testing.assert_close(Caller().run(model, case.batch()).logits, model(case.batch()))


def test_a_net_with_a_part_called_module_is_run_whole() -> None:
    case = zoo.named("scaling-module")
    model = case.build()
    assert torch.equal(Caller().run(model, case.batch()).output, model(case.batch()))


@pytest.mark.gpu
def test_inputs_go_to_where_the_model_is_or_to_the_device_asked_for() -> None:
    assert Caller().run(nn.Linear(4, 2, device="cuda"), {"input": X}).output.device.type == "cuda"
    assert Caller(device="cuda").run(Plain(), (X, Y)).output.device.type == "cuda"
    assert Caller().run(nn.Linear(4, 2), (X.cuda(), Y)).output.device.type == "cpu"


def test_autocast_is_on_for_the_call_only() -> None:
    assert Caller(autocast=torch.bfloat16).run(nn.Linear(4, 2), X).output.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert Caller().run(nn.Linear(4, 2), X).output.dtype == torch.float32


def test_images_and_volumes_are_laid_out_with_channels_last_where_asked() -> None:
    caller = Caller(channels_last=True)
    image, volume = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4, 4)
    assert caller.run(Plain(), image).output.is_contiguous(memory_format=torch.channels_last)
    assert caller.run(Plain(), volume).output.is_contiguous(memory_format=torch.channels_last_3d)
    assert caller.run(Plain(), X).output.is_contiguous()
    assert image.is_contiguous()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_with_batch_and_sample(bad: float) -> None:
    x = X.clone()
    x[1, 2, 3] = bad
    with pytest.raises(BatchError, match="batch 7 holds 1 numbers that are NaN or infinite, first in sample 1"):
        Caller().run(Plain(), x, index=7)


def test_large_finite_numbers_and_integers_pass() -> None:
    Caller().run(Plain(), torch.full((2, 9), 3e38))
    Caller().run(Plain(), torch.full((2, 9), 1e300, dtype=torch.float64))
    Caller().run(Plain(), torch.ones(2, 3, dtype=torch.int64))


def test_missing_labels_are_no_concern_of_the_inputs() -> None:
    nothing = torch.full((2,), float("nan"))
    Caller().run(Plain(), (X, nothing))
    Caller(forward=lambda model, batch: model(batch[0])).run(Plain(), (X, nothing))


def test_a_batch_without_samples_is_refused() -> None:
    with pytest.raises(BatchError, match="batch 3 holds no samples"):
        Caller().run(Plain(), torch.empty(0, 3), index=3)


def test_an_error_of_the_models_own_carries_the_batch_it_met() -> None:
    with pytest.raises(RuntimeError) as caught:
        Caller().run(nn.Linear(9, 2), (X, Y), index=4)
    assert any("batch 4" in note and "(2, 3, 4) float32" in note for note in caught.value.__notes__)


# ── logits ──


@pytest.mark.parametrize(
    ("given", "output"),
    [
        (X, None),
        ((X, Y), None),
        ([X], None),
        ({"logits": X, "hidden": Y}, None),
        ({"out": X, "aux": Y}, None),
        ({"whatever": X}, None),
        (animals.Answer(X), None),
        (animals.Answer(Y, (X,)), lambda out: out.hidden_states[0]),
        ((Y, X), 1),
        ({"boxes": Y, "scores": X}, "scores"),
        (animals.Answer(Y, loss=X), "loss"),
        (namedtuple("Out", "a b")(Y, X), "b"),
    ],
)
def test_the_logits_are_found(given: Any, output: Any) -> None:
    class Gives(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return given

    caller = Caller(output=output)
    result = caller.run(Gives(), X)
    assert result.logits is X
    assert caller.logits(result, asked="evaluate") is X


@pytest.mark.parametrize("name", ["returns-dict", "returns-dataclass", "returns-tuple"])
def test_outputs_of_the_zoo_give_their_logits(name: str) -> None:
    case = zoo.named(name)
    model = case.build()
    assert case.output is not None
    assert torch.equal(Caller().run(model, case.batch()).logits, case.output(model(case.batch())))


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"first": x, "second": x}


def test_an_output_without_evident_logits_is_no_error_until_they_are_needed() -> None:
    result = Caller().run(Strange(), X)
    assert result.logits is None
    with pytest.raises(
        UsageError, match=r"evaluate needs the model's logits, but .* a mapping with first, second; .*output="
    ):
        Caller().logits(result, asked="evaluate")


@pytest.mark.parametrize("output", ["third", 0])
def test_an_output_that_is_not_there_is_refused_with_what_is(output: Any) -> None:
    with pytest.raises(UsageError, match=rf"output={output!r} was asked .* a mapping with first, second"):
        Caller(output=output).run(Strange(), X)


@pytest.mark.parametrize("output", ["x", lambda out: 3])
def test_an_output_that_is_no_tensor_is_refused(output: Any) -> None:
    class Text(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"x": "text"}

    with pytest.raises(UsageError, match=r"output= .* (a str|a int), not a tensor"):
        Caller(output=output).run(Text(), X)


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match=r"forward is a function of \(model, batch\); got 3"):
        Caller(forward=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"output is a key, an index or a function.*got 1\.5"):
        Caller(output=1.5)  # type: ignore[arg-type]


# ── iterables ──


def test_one_shot_iterators_are_refused_where_several_passes_are_needed() -> None:
    for iterator in (iter([X]), (x for x in [X]), map(abs, [X])):
        with pytest.raises(OneShot, match=r"check= reads its batches several times, but was given a .*DataLoader"):
            several_passes(iterator, asked="check=")


def test_a_loader_that_can_be_read_again_is_not_touched_by_the_question() -> None:
    loader = DataLoader(TensorDataset(X, Y), shuffle=True)
    before = process()
    assert several_passes(loader, asked="check=") is loader
    assert process() == before


@pytest.mark.parametrize("batches", [3, None])
def test_what_cannot_be_iterated_is_refused_there_too(batches: Any) -> None:
    with pytest.raises(UsageError, match="check= takes an iterable of batches"):
        several_passes(batches, asked="check=")


def test_batches_come_numbered_and_one_at_a_time() -> None:
    def lazily() -> Any:
        yield X
        raise RuntimeError("read too far")

    numbered = nonempty(lazily(), asked="observe")
    assert next(numbered)[0] == 0


@pytest.mark.parametrize("batches", ["folder", b"x", 3, None, nn.Linear(1, 1), nn.Sequential()], ids=str)
def test_what_is_no_iterable_of_batches_is_refused_with_its_type(batches: Any) -> None:
    with pytest.raises(UsageError, match=f"observe takes an iterable of batches.*got {type(batches).__name__}"):
        nonempty(batches, asked="observe")


def test_one_tensor_in_the_place_of_batches_is_refused_with_its_shape() -> None:
    with pytest.raises(UsageError, match=r"got one tensor of shape \(2, 3, 4\): put it in a list"):
        nonempty(X, asked="observe")


def test_no_batch_at_all_is_refused() -> None:
    with pytest.raises(BatchError, match="observe was given batches, but there was none"):
        list(nonempty([], asked="observe"))


def test_mapping_over_tensors_keeps_every_container() -> None:
    value = {"a": [X, (Y, "text")], "b": Item(X, Y), "c": Pair(X, Y), "d": 3}
    doubled = map_tensors(lambda t: t * 2, value)
    assert torch.equal(doubled["a"][0], X * 2)
    assert torch.equal(doubled["a"][1][0], Y * 2)
    assert isinstance(doubled["b"], Item)
    assert isinstance(doubled["c"], Pair)
    assert torch.equal(doubled["c"].target, Y * 2)
    assert len(tensors_in(value)) == 6


def test_a_batch_or_a_model_without_values_is_refused() -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    with pytest.raises(BatchError, match="batch 2 is on the meta device, where tensors have no values"):
        Caller().run(model, x.to("meta"), index=2)
    with pytest.raises(UsageError, match="it is on the meta device, where weights have no values"):
        Caller().run(nn.Linear(3, 2, device="meta"), x)
