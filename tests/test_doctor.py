"""The doctor: each rule finds what it is for, a healthy model is healthy, and no model is changed by being looked at."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.doctor import diagnose
from renorm.errors import BatchError
from renorm.profile import profile
from renorm.rules.base import PASSES, SEVERITIES, Finding, catalogue
from renorm.rules.data_shift import DataShift
from tests.data import shared


def trained(*, channels: int = 6) -> nn.Sequential:
    """A network whose statistics are those of standard normal images."""
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
    model.train()(images(400))
    return model.eval()


def images(count: int, *, scale: float = 1.0, offset: float = 0.0, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * scale + offset


def rules(findings: tuple[Finding, ...]) -> set[str]:
    return {finding.rule for finding in findings}


def test_a_model_that_fits_its_data_is_healthy() -> None:
    diagnosis = diagnose(trained(), [images(50), images(50, seed=2)])
    assert diagnosis.healthy
    assert diagnosis.findings == ()
    assert diagnosis.worst is None
    assert diagnosis.samples == 100
    assert set(diagnosis.shifts) == set(diagnosis.distances) == {"1", "4"}
    assert str(diagnosis) == "nothing wrong was found"


def test_a_model_without_batch_norm_is_healthy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.LayerNorm(4))
    for batches in (None, [images(3)]):
        diagnosis = diagnose(model, batches)
        assert diagnosis.healthy
        assert [site.kind for site in diagnosis.sites] == ["layer"]


def test_without_data_only_the_model_is_looked_at() -> None:
    diagnosis = diagnose(trained())
    assert diagnosis.shifts == {}
    assert diagnosis.samples == 0
    assert diagnosis.unvisited == ()


@pytest.mark.parametrize(("scale", "offset"), [(0.2, 0.0), (1.0, 3.0), (4.0, 0.0)])
def test_shifted_data_are_found_worst_first(scale: float, offset: float) -> None:
    diagnosis = diagnose(trained(), [images(100, scale=scale, offset=offset)])
    assert not diagnosis.healthy
    assert rules(diagnosis.findings) <= {"BN301", "BN302"}  # shifted data part the modes too
    values = [finding.value for finding in diagnosis.findings if finding.rule == "BN302"]
    assert values == sorted(values, reverse=True)
    assert diagnosis.worst == diagnosis.findings[0]
    assert list(diagnosis.distances.values()) == sorted(diagnosis.distances.values(), reverse=True)
    assert diagnosis.worst.severity == "error"
    assert diagnosis.worst.unit == "source sd"


def test_the_advice_names_preprocessing_where_the_first_layer_is_worst() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.zeros_(model[1].weight)  # nothing passes on, so the second layer sees no shift
    for norm in (model[0], model[2]):
        norm.momentum = None
    model.train()(images(100))
    diagnosis = diagnose(model.eval(), [images(100, scale=255)])
    assert diagnosis.worst is not None
    assert (diagnosis.worst.rule, diagnosis.worst.site) == ("BN303", "0"), "the cause, before the shift that it makes"
    assert "preprocessing first" in next(f for f in diagnosis.findings if f.rule == "BN302").advice


def test_with_a_profile_a_sources_own_distance_is_no_shift() -> None:
    """A checkpoint whose statistics never fitted its source well: with a profile, the same data are not called shifted."""
    own = images(300, scale=1.6, seed=5)
    model = trained()
    model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    known = profile(model, [own])
    fresh, farther = images(300, scale=1.6, seed=6), images(300, scale=3.0, seed=6)
    assert not diagnose(model, [fresh]).healthy
    assert diagnose(model, [fresh], source=known).healthy
    diagnosis = diagnose(model, [farther], source=known)
    assert not diagnosis.healthy
    assert all(finding.limit > DataShift.limit for finding in diagnosis.findings)


def test_few_images_do_not_look_like_a_shift() -> None:
    """Twelve images of the source's own kind: the sampling error is taken off the distance."""
    diagnosis = diagnose(trained(), [images(12, seed=7)])
    assert diagnosis.healthy
    for site, shift in diagnosis.shifts.items():
        assert diagnosis.distances[site] < shift.layer.wasserstein2


def test_one_image_says_nothing() -> None:
    assert set(diagnose(trained(), [images(1, scale=5)]).distances.values()) == {0.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_impossible_statistics_are_an_error(value: float) -> None:
    model = trained()
    model[1].running_var[2] = value
    worst = diagnose(model).worst
    assert worst is not None
    assert (worst.rule, worst.site, worst.severity, worst.value) == ("BN108", "1", "error", 1.0)
    with_data = diagnose(model, [images(20)])
    assert with_data.worst is not None
    assert with_data.worst.rule == "BN108"
    assert all(math.isfinite(distance) for distance in with_data.distances.values())


def test_statistics_that_a_checkpoint_lost_are_an_error() -> None:
    model = trained()
    for norm in (model[1], model[4]):
        norm.reset_running_stats()
    findings = diagnose(model).findings
    assert [(f.rule, f.severity) for f in findings] == [("BN105", "error")] * 2
    # and what was never estimated is not called a shift of the data besides
    assert rules(diagnose(model, [images(20, scale=9)]).findings) == {"BN105"}


def test_a_layer_that_training_never_reached_is_a_warning() -> None:
    model = trained()
    model[0].add_module("unused", nn.BatchNorm2d(5).eval())  # inside a layer that does not call it
    diagnosis = diagnose(model, [images(50)])
    assert [(f.rule, f.site, f.severity) for f in diagnosis.findings] == [("BN105", "0.unused", "warning")]
    assert diagnosis.unvisited == ("0.unused",)


def test_an_untrained_model_is_told_once_and_is_healthy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval()
    for batches in (None, [images(20, scale=9)]):
        diagnosis = diagnose(model, batches)
        assert diagnosis.healthy
        assert [(f.rule, f.severity, f.value) for f in diagnosis.findings] == [("BN105", "info", 2.0)]


def test_a_batch_norm_without_statistics_is_a_warning() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).eval()
    finding = diagnose(model).worst
    assert finding is not None
    assert (finding.rule, finding.site, finding.severity) == ("BN104", "0", "warning")
    assert [(f.rule, f.severity) for f in diagnose(nn.LazyBatchNorm2d()).findings] == [("BN114", "error")]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var)


def test_batch_norm_called_as_a_function_is_reported() -> None:
    diagnosis = diagnose(Functional(), [images(5), images(5)])
    assert [(f.rule, f.severity, f.value) for f in diagnosis.findings] == [("BN312", "info", 1.0)]


def test_errors_come_before_warnings_before_infos() -> None:
    model = trained()
    model[0].add_module("unused", nn.BatchNorm2d(5).eval())  # inside a layer that does not call it
    model[1].running_mean[0] = math.nan
    severities = [f.severity for f in diagnose(model, [images(20)]).findings]
    assert severities == sorted(severities, key=SEVERITIES.index)
    assert len(set(severities)) > 1


def test_the_model_is_the_same_afterwards() -> None:
    model = trained()
    model[4].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    diagnose(model, [images(20, scale=3)])
    with pytest.raises(BatchError, match="NaN or infinite"):
        diagnose(model, [torch.full((2, 3, 8, 8), math.nan)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_batches_are_read_once() -> None:
    reads = 0

    class Counted(list[Tensor]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            nonlocal reads
            reads += 1
            return super().__iter__()

    diagnose(trained(), Counted([images(10)]))
    assert reads == 1


def test_every_rule_says_what_it_needs_and_where_to_look() -> None:
    for rule in catalogue().values():
        assert rule.__doc__
        assert rule.title
        assert {*rule.needs, *rule.wants} <= set(PASSES)


def test_the_limit_is_that_of_the_rule() -> None:
    assert DataShift().limit < DataShift().error
    distance = diagnose(trained(), [images(200, scale=0.8)]).distances["1"]
    assert (distance > DataShift.limit) == (not diagnose(trained(), [images(200, scale=0.8)]).healthy)


@pytest.mark.slow
@pytest.mark.parametrize(("contrast", "healthy"), [(1.0, True), (0.15, False)])
def test_a_real_network_on_its_own_data_and_on_low_contrast(contrast: float, healthy: bool) -> None:
    from renorm.models import open_model

    model = open_model(f"{shared('nets.py')}:resnet20", checkpoint=shared("weights/resnet20-12fca82f.th"))
    pixels = np.load(shared("cifar10_lossless_test200.npz"))["images"] / 255.0
    mean = pixels.mean((1, 2), keepdims=True)
    pixels = mean + contrast * (pixels - mean)
    assert model.preprocessing is not None
    inputs = model.preprocessing.tensor(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
    diagnosis = diagnose(model.module, list(inputs.split(50)))
    assert diagnosis.healthy is healthy


class Picky(nn.Module):
    """Runs dark images only; the first layers see bright ones before it says so."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        if float(x.max()) > 50:
            raise RuntimeError("too bright\nby far")
        return y


def test_a_batch_that_the_model_cannot_run_is_told_and_the_rest_goes_on() -> None:
    model = Picky().eval()
    good = [images(50), images(50, seed=2)]
    whole, without = diagnose(model, good), diagnose(model, [good[0], images(50, scale=40, offset=50), good[1]])
    assert without.findings == whole.findings
    assert without.distances == pytest.approx(whole.distances)
    assert without.samples == 100
    assert whole.notes == ()
    assert without.notes == ("batch 1 was left out, for the model could not run it: too bright",)
    with pytest.raises(RuntimeError, match="too bright"):
        diagnose(model, [images(50, scale=40, offset=50)])


def test_fixes_leave_out_what_could_not_be_run() -> None:
    model = Picky().eval()
    model.net[4].reset_running_stats()
    nan = torch.full((2, 3, 8, 8), math.nan)
    found = diagnose(model, [images(50), nan, images(50, seed=2)])
    assert [f.rule for f in found.findings] == ["BN105"]
    assert "NaN or infinite" in found.notes[0]
    found.findings[0].fix_(model)
    assert diagnose(model, [images(50)]).healthy


def scripted() -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: torch.jit.ScriptModule = torch.jit.trace(trained(), images(2))
    return made


def test_of_a_scripted_model_the_weights_alone_are_looked_at() -> None:
    model = scripted()
    model.state_dict()["1.running_var"][1] = -1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for batches in (None, [images(50)]):
        found = diagnose(model, batches)
        assert [(f.rule, f.site, f.fix_) for f in found.findings if f.severity == "error"] == [("BN108", "1", None)]
        assert "its weights alone were looked at" in found.notes[0]
        assert {site.name for site in found.sites} == {"1", "4"}
        assert found.samples == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_quantised_layer_takes_no_notice_of_its_mode() -> None:
    quantised = pytest.importorskip("torch.ao.nn.quantized").BatchNorm2d(3)
    model = nn.Sequential(quantised).eval()
    quantised.train()  # as torch.ao.quantization.convert leaves it
    assert [finding.rule for finding in diagnose(model).findings if finding.severity == "error"] == []


def test_a_scripted_part_is_told_and_the_rest_is_looked_at() -> None:
    model = nn.Sequential(scripted(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)).eval()
    model[2].running_var[1] = -1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for batches in (None, [images(50), images(50, seed=2)]):
        found = diagnose(model, batches)
        assert [f.site for f in found.findings if f.rule == "BN108"] == ["2"]
        assert found.notes == ("scripted or traced, so that nothing can be watched inside: 0",)
        assert found.unvisited == ()
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model[1:])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


class Two(nn.Module):
    """Takes two inputs, or an input and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = trained(), trained()

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        both: Tensor = self.left(x) * scale + self.right(y)
        return both.mean((2, 3))


def test_several_inputs_are_passed_by_place_or_by_name_even_where_a_name_is_that_of_labels() -> None:
    x, y, labels = images(50), images(50, seed=2), torch.arange(50) % 4
    for batch in (((x, y), labels), {"x": x, "y": y, "labels": labels}, [[x, y], labels]):
        found = diagnose(Two().eval(), [batch])
        assert set(found.distances) == {"left.1", "left.4", "right.1", "right.4"}
        assert found.healthy


def test_a_model_that_needs_arguments_says_how_to_give_them() -> None:
    model = Two().eval()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'") as caught:
        diagnose(model, [images(50)])
    assert "forward=lambda model, batch" in caught.value.__notes__[-1]
    assert diagnose(model, [images(50)], forward=lambda m, batch: m(batch, batch, 2.0)).samples == 50
    assert diagnose(model).healthy  # the model alone needs none


def test_a_quantised_model_is_looked_at() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = trained()[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.quantize_per_tensor(x.repeat(1, 2, 1, 1), 0.1, 0, torch.qint8))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch gives its quantised tensors up
        model = Quantised().eval()
        model.norm.forward = lambda x: x.dequantize()  # type: ignore[method-assign]
        assert set(diagnose(model, [images(50)]).distances) == {"norm"}
