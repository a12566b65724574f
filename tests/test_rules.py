"""Each rule finds its own disease, in several kinds of models; what it can mend it mends, and the undo is exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.doctor import Diagnosis, diagnose
from renorm.errors import UsageError
from renorm.facts import Facts
from renorm.fold import fold
from renorm.freeze import freeze_
from renorm.mend import at_sites, setting
from renorm.observe import observe
from renorm.rules.base import Finding, Severity, catalogue, worst_first
from renorm.sites import find_sites
from tests import zoo
from tests.contracts.photograph import differences, photograph, process

Change = Callable[[nn.Module], object]


def images(count: int, *, seed: int = 1, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * scale + offset


def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` with an affine as training leaves it and the statistics of `x`, in evaluation."""
    norms = [site.module for site in find_sites(model) if site.kind == "batch"]
    for norm in norms:
        if isinstance(getattr(norm, "weight", None), nn.Parameter):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
        norm.momentum = None
    model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
        norm.num_batches_tracked.fill_(100)
    return model.eval()


def convs() -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    body = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    return settle(nn.Sequential(*body, *head), images(200))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(192, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x.flatten(1))))


def flat() -> nn.Module:
    return settle(Flat(), images(200))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.SyncBatchNorm(6))
        self.branch = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x)).mean((2, 3)))


def residual() -> nn.Module:
    model = Residual()
    sync, model.stem[1] = model.stem[1], nn.BatchNorm2d(6)  # SyncBatchNorm cannot be trained on a CPU
    settle(model, images(200))
    sync.load_state_dict(model.stem[1].state_dict())
    model.stem[1] = sync.eval()
    return model


MODELS = {"convs": convs, "flat": flat, "residual": residual}


def norms(model: nn.Module) -> list[Any]:
    return [site.module for site in find_sites(model) if site.kind == "batch"]


@dataclass(frozen=True)
class Disease:
    """A change that makes a model sick, the rule and severity that should be found, and whether the tool mends it."""

    rule: str
    severity: str
    make: Change
    mends: bool = True
    data: bool = False  # found, or mended, only with batches


def _freeze_affine(model: nn.Module, *, train: bool) -> None:
    model.train(train)
    for norm in norms(model):
        norm.requires_grad_(False)


def _stop_last(model: nn.Module) -> None:
    model.train()
    norms(model)[-1].eval()


def _set(**values: Any) -> Change:
    def change(model: nn.Module) -> None:
        for name, value in values.items():
            setattr(norms(model)[-1], name, value)

    return change


def _fill(name: str, value: float, *, channels: slice = slice(0, 1)) -> Change:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            getattr(norms(model)[-1], name)[channels] = value

    return change


def _half(dtype: torch.dtype, *, train: bool = False) -> Change:
    def change(model: nn.Module) -> None:
        norm = norms(model)[-1].to(dtype)
        if train:
            norm.momentum = 0.01
            model.train()

    return change


def _reset(model: nn.Module) -> None:
    norms(model)[-1].reset_running_stats()


def _mode(model: nn.Module) -> None:
    norms(model)[-1].train()


def _dead(model: nn.Module) -> None:
    with torch.no_grad():
        norms(model)[-1].weight[:3] = 0


def _fractional(model: nn.Module) -> None:
    norms(model)[-1].num_batches_tracked = torch.tensor(12.5)


def _few_updates(model: nn.Module) -> None:
    """What nine updates from mean 0 and variance 1 would have left of the statistics."""
    for norm in norms(model):
        left = 0.9**9
        norm.running_mean.mul_(1 - left)
        norm.running_var.mul_(1 - left).add_(left)
        norm.num_batches_tracked.fill_(9)


DISEASES = [
    Disease("BN101", "error", lambda m: _freeze_affine(m, train=True)),
    Disease("BN102", "warning", lambda m: _freeze_affine(m, train=False)),
    Disease("BN102", "warning", _stop_last),
    Disease("BN103", "error", _set(track_running_stats=False)),
    Disease("BN104", "warning", _set(running_mean=None, running_var=None), mends=False),
    Disease("BN105", "error", _reset, data=True),
    Disease("BN106", "warning", _set(momentum=0.99)),
    Disease("BN106", "warning", _set(momentum=0.5)),
    Disease("BN106", "warning", _set(momentum=0.0)),
    Disease("BN107", "warning", _set(eps=0.0)),
    Disease("BN107", "warning", _set(eps=0.1), mends=False),
    Disease("BN108", "error", _fill("running_var", math.nan), data=True),
    Disease("BN108", "error", _fill("running_mean", math.inf), data=True),
    Disease("BN108", "error", _fill("running_var", -1.0), data=True),
    Disease("BN109", "warning", _fill("running_var", 0.0), data=True),
    Disease("BN110", "warning", _half(torch.bfloat16)),
    Disease("BN110", "warning", _half(torch.float16)),
    Disease("BN110", "error", _half(torch.bfloat16, train=True)),
    Disease("BN111", "info", _dead, mends=False),
    Disease("BN202", "info", _fractional),
    Disease("BN501", "error", _mode),
]


def found(diagnosis: Diagnosis, rule: str) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.rule == rule]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_models_are_healthy_before_they_are_made_sick(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert diagnose(model).findings == ()
    assert diagnose(model, [images(50, seed=s) for s in range(4)]).findings == ()


@pytest.mark.parametrize("disease", DISEASES, ids=lambda d: d.rule)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_disease_is_found_and_mended_and_the_mend_undone(make: Callable[[], nn.Module], disease: Disease) -> None:
    model = make()
    disease.make(model)
    batches = [images(50), images(50, seed=2)] if disease.data else None
    before = photograph(model)
    findings = found(diagnose(model, batches), disease.rule)
    assert findings, f"{disease.rule} was not found"
    assert {f.severity for f in findings} == {disease.severity}
    assert differences(before, photograph(model)) == []
    mends = {id(f.fix_): f.fix_ for f in findings if f.fix_ is not None}
    assert bool(mends) == disease.mends
    undos = [fix_(model) for fix_ in mends.values()]
    assert bool(found(diagnose(model, batches), disease.rule)) != disease.mends
    for undo in reversed(undos):
        undo.restore_()
    assert differences(before, photograph(model)) == []


@pytest.mark.parametrize("disease", [d for d in DISEASES if d.mends and not d.data], ids=lambda d: d.rule)
def test_a_mend_fits_a_copy_and_no_other_model(disease: Disease) -> None:
    model = convs()
    disease.make(model)
    twin = copy.deepcopy(model)
    (finding, *_) = found(diagnose(model), disease.rule)
    assert finding.fix_ is not None
    finding.fix_(twin)
    assert len(found(diagnose(twin), disease.rule)) < len(found(diagnose(model), disease.rule))
    with pytest.raises(UsageError, match=r"no such norm layer|is left by that"):
        finding.fix_(nn.Sequential(nn.BatchNorm2d(3)))


def test_a_mend_that_fails_midway_leaves_nothing_changed() -> None:
    model = convs()
    before = photograph(model)

    def change_(site: Any) -> None:
        site.module.momentum = 0.7
        if site.name == "4":
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        at_sites(["1", "4"], change_, label="a test")(model)
    assert differences(before, photograph(model)) == []


def test_only_the_named_sites_are_set() -> None:
    model = convs()
    setting(["4"], label="a test", momentum=0.25)(model)
    assert [norm.momentum for norm in norms(model)] == [0.1, 0.25]


@pytest.mark.parametrize(("momentum", "mended"), [(0.99, 0.01), (0.9, 0.1), (0.5, 0.1), (1.0, 0.1), (0.0, 0.1)])
def test_a_tensorflow_momentum_is_turned_round(momentum: float, mended: float) -> None:
    model = convs()
    norms(model)[0].momentum = momentum
    (finding,) = found(diagnose(model), "BN106")
    assert finding.fix_ is not None
    finding.fix_(model)
    assert norms(model)[0].momentum == mended


def test_a_plain_average_is_named_only_where_it_trains() -> None:
    model = convs()
    norms(model)[0].momentum = None
    assert diagnose(model).findings == ()
    model.train()
    assert [(f.rule, f.severity) for f in diagnose(model).findings if f.rule == "BN106"] == [("BN106", "info")]


def test_a_constant_channel_without_eps_is_an_error() -> None:
    model = convs()
    norms(model)[0].eps = 0.0
    norms(model)[0].running_var[1] = 0
    (finding,) = found(diagnose(model), "BN107")
    assert (finding.severity, finding.value) == ("error", 1.0)


def test_statistics_in_float32_do_not_change_what_a_half_model_says() -> None:
    model = convs().to(torch.bfloat16)
    x = images(8).to(torch.bfloat16)
    with torch.no_grad():
        before = model(x)
        for finding in found(diagnose(model), "BN110"):
            assert finding.fix_ is not None
            finding.fix_(model)
        assert norms(model)[0].running_var.dtype == torch.float32
        torch.testing.assert_close(model(x), before, atol=0.03, rtol=0.03)


def test_a_freeze_of_renorm_and_a_train_of_the_models_own_are_believed() -> None:
    model = convs()
    handle = freeze_(model)
    model.train()
    assert rules(diagnose(model)) == set()
    handle.restore_()

    class Stays(nn.Sequential):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            for norm in norms(self):
                norm.eval()
            return self

    own = Stays(*convs()).train()
    before = photograph(own)
    assert rules(diagnose(own)) == set()
    assert differences(before, photograph(own)) == []


def rules(diagnosis: Diagnosis) -> set[str]:
    return {finding.rule for finding in diagnosis.findings}


def test_bias_in_front_is_named_in_training_and_moved_into_the_mean() -> None:
    model = convs()
    x = images(20)
    with torch.no_grad():
        was = model(x)
    assert diagnose(model).findings == ()
    model.train()
    (finding,) = found(diagnose(model), "BN115")
    assert finding.value == 2
    before = photograph(model)
    assert finding.fix_ is not None
    undo = finding.fix_(model)
    assert found(diagnose(model), "BN115") == []
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), was, atol=1e-5, rtol=1e-5)
    undo.restore_()
    assert differences(before, photograph(model.train())) == []
    with pytest.raises(UsageError, match="no layer right in front"):
        finding.fix_(nn.Sequential(nn.BatchNorm2d(3)))


def test_a_file_without_statistics_is_an_error() -> None:
    model = convs()
    state = {name: value for name, value in model.state_dict().items() if "running" not in name}
    assert [(f.rule, f.site, f.value) for f in diagnose(model, checkpoint=state).findings] == [
        ("BN201", "1", 2.0),
        ("BN201", "4", 2.0),
    ]
    assert diagnose(model, checkpoint=model.state_dict()).findings == ()
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    assert diagnose(model, checkpoint=wrapped).findings == ()


def test_a_plain_average_breaks_the_graph_of_a_compiled_model() -> None:
    model = convs()
    norms(model)[0].momentum = None
    compiled = torch.compile(model, backend="eager")
    (finding,) = found(diagnose(compiled), "BN506")
    assert finding.fix_ is not None
    finding.fix_(compiled)
    assert found(diagnose(compiled), "BN506") == []


# ── a few batches ──


def test_statistics_after_few_updates_are_found_and_corrected_without_data() -> None:
    batches = [images(50, seed=s, scale=8.0, offset=4.0) for s in range(4)]
    sound = settle(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.cat(batches))
    for norm in norms(sound):
        norm.num_batches_tracked.fill_(9)
    assert found(diagnose(sound, batches), "BN308") == []  # the counter alone is no proof
    model = copy.deepcopy(sound)
    _few_updates(model)
    findings = found(diagnose(model, batches), "BN308")
    assert findings
    before = photograph(model)
    assert findings[0].fix_ is not None
    undo = findings[0].fix_(model)
    torch.testing.assert_close(norms(model)[0].running_var, norms(sound)[0].running_var)
    torch.testing.assert_close(norms(model)[0].running_mean, norms(sound)[0].running_mean)
    undo.restore_()
    assert differences(before, photograph(model)) == []


class Branching(nn.Module):
    """Its batch norm is registered behind a convolution that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.one(x)) + self.other(x))
        return out


def _fold_by_order(model: Branching, conv: str) -> nn.Module:
    folded = copy.deepcopy(model)
    fused = nn.utils.fusion.fuse_conv_bn_eval(getattr(folded, conv), folded.norm)
    setattr(folded, conv, fused)
    folded.norm = nn.Identity()
    return folded


def test_a_fold_that_is_not_equivalent_is_found_and_named() -> None:
    torch.manual_seed(0)
    model = settle(Branching(), images(64))
    assert isinstance(model, Branching)
    batches = [images(20), images(20, seed=2)]
    wrong, right = _fold_by_order(model, "other"), _fold_by_order(model, "one")
    before = photograph(model), photograph(wrong)
    (finding,) = found(diagnose(model, batches, folded=wrong), "BN503")
    assert (finding.site, finding.severity) == ("norm", "error")
    assert finding.value > 0.1
    assert differences(before[0], photograph(model)) == differences(before[1], photograph(wrong)) == []
    assert found(diagnose(model, batches, folded=right), "BN503") == []
    assert found(diagnose(model, batches, folded=fold(model, batches[0]).model), "BN503") == []
    assert found(diagnose(model, folded=wrong), "BN503") == []  # without batches nothing is compared
    other = copy.deepcopy(wrong)
    other.last[3] = nn.Linear(4 * 36, 5)
    with pytest.raises(UsageError, match="the folded model gives tensors of shape"):
        diagnose(model, batches, folded=other)


def test_few_updates_stand_before_the_shift_they_explain_and_one_fix_mends_all_layers() -> None:
    batches = [images(50, seed=s, scale=0.2) for s in range(4)]
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    sound = settle(nn.Sequential(*layers), torch.cat(batches))
    model = copy.deepcopy(sound)
    _few_updates(model)
    before = photograph(model)
    diagnosis = diagnose(model, batches)
    assert diagnosis.findings[0].rule == "BN308"
    assert diagnosis.findings[0].severity == "error"
    assert found(diagnosis, "BN302") == [], "these data are what it was trained on"
    assert differences(before, photograph(model)) == []
    (fix_,) = {finding.fix_ for finding in found(diagnosis, "BN308")}
    assert fix_ is not None
    fix_(model)
    for norm, other in zip(norms(model), norms(sound), strict=True):
        torch.testing.assert_close(norm.running_var, other.running_var, rtol=1e-4, atol=1e-5)
    # data that are far from what it was trained on are, whatever few updates left
    moved = [batch * 9 + 3 for batch in batches]
    _few_updates(model)
    assert found(diagnose(model, moved), "BN302")


def test_a_cause_stands_before_what_it_explains_and_severity_before_both() -> None:
    def finding(rule: str, severity: Severity, value: float) -> Finding:
        return Finding(rule, "a", severity, value, "", 1.0, "", "")

    shift, gap, few = (finding(rule, "error", v) for rule, v in (("BN302", 9), ("BN301", 5), ("BN308", 2)))
    other, mild = finding("BN109", "error", 6), finding("BN308", "warning", 99)
    order = worst_first([mild, gap, other, few, shift, finding("BN999", "info", 1)])
    assert [f.rule for f in order] == ["BN308", "BN302", "BN109", "BN301", "BN308", "BN999"]
    assert worst_first([gap, other]) == (other, gap)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_modes_that_disagree_are_found_and_recalibrating_mends_them(make: Callable[[], nn.Module]) -> None:
    model = make()
    generator = torch.Generator().manual_seed(5)
    for norm in norms(model):
        norm.running_mean.add_(torch.randn(6, generator=generator) * 3 * norm.running_var.sqrt())
    batches = [images(64), images(64, seed=2)]
    (finding,) = found(diagnose(model, batches), "BN301")
    assert finding.value > finding.limit
    before = photograph(model)
    assert finding.fix_ is not None
    undo = finding.fix_(model)
    left = Facts(model, batches).gap
    assert left is not None
    assert left.changed - left.noise < 0.8 * finding.value
    undo.restore_()
    assert differences(before, photograph(model)) == []


def test_with_labels_only_a_better_training_mode_is_a_fault() -> None:
    model = convs()
    labelled = []
    with torch.no_grad():
        for seed in range(2):
            labelled.append((images(64, seed=seed), model(images(64, seed=seed)).argmax(1)))
    assert found(diagnose(model, labelled), "BN301") == []
    for norm in norms(model):
        norm.running_mean.add_(torch.linspace(-4, 4, 6))
    (finding,) = found(diagnose(model, labelled), "BN301")
    assert finding.severity == "error"
    assert "right in training mode" in finding.unit


def test_few_values_a_channel() -> None:
    model = flat()
    (first, *_) = found(diagnose(model, [images(8), images(8, seed=2)]), "BN304")
    assert (first.severity, first.value, first.limit) == ("info", 8.0, 16.0)
    model.train()
    assert found(diagnose(model, [images(8)]), "BN304")[0].severity == "warning"
    assert found(diagnose(model, [images(20), images(1)]), "BN304")[0].severity == "error"
    assert found(diagnose(model.eval(), [images(20), images(1)]), "BN304") == []


def test_batches_in_an_order() -> None:
    model = convs()
    kinds = [images(40, seed=s, offset=0.4 * (s % 4)) for s in range(8)]
    ordered = found(diagnose(model, kinds), "BN305")
    assert len(ordered) == 1
    assert ordered[0].severity == "warning"
    mixed = torch.cat(kinds)[torch.randperm(320, generator=torch.Generator().manual_seed(0))]
    assert found(diagnose(model, list(mixed.split(40))), "BN305") == []


def test_one_batch_unlike_the_others() -> None:
    batches = [images(30, seed=s) for s in range(8)]
    assert found(diagnose(convs(), batches), "BN309") == []
    batches[3] = batches[3] * 30
    (finding,) = found(diagnose(convs(), batches), "BN309")
    assert finding.severity == "error"


def test_parts_are_the_batches_alone() -> None:
    model = convs()
    batches = [images(10), images(30, seed=2, offset=5.0), images(7, seed=3)]
    parts = Facts(model, batches).parts
    assert len(parts) == 3
    for part, batch in zip(parts, batches, strict=True):
        alone = observe(model, [batch], under="running")
        for name, seen in alone.items():
            for got, wanted in zip(part[name], seen, strict=True):
                assert got.count == wanted.count
                torch.testing.assert_close(got.mean, wanted.mean, atol=1e-9, rtol=1e-6)
                torch.testing.assert_close(got.var, wanted.var, atol=1e-6, rtol=1e-4)


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).mean(2)


def test_padding_is_counted_as_data() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, 60, generator=generator) + 2
    model = settle(Sequences(), x)
    assert found(diagnose(model, [x]), "BN307") == []
    same_length = x.clone()
    for row in range(40):
        x[row, :, 20 + row :] = 0
    (finding,) = found(diagnose(model, [x]), "BN307")
    assert finding.severity == "warning"
    same_length[:, :, 30:] = 0  # an equal end everywhere is not padding
    assert found(diagnose(model, [same_length]), "BN307") == []


class ByTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x.mean((2, 3)), None, None, training=True)


def test_an_answer_that_depends_on_the_batch_is_an_error() -> None:
    assert found(diagnose(convs(), [images(20)]), "BN310") == []
    assert found(diagnose(convs(), [images(1)]), "BN310") == []
    (finding,) = found(diagnose(ByTheBatch(), [images(20)]), "BN310")
    assert finding.severity == "error"
    silent = convs()
    silent[4] = nn.BatchNorm2d(6, track_running_stats=False).eval()
    (finding,) = found(diagnose(silent, [images(20)]), "BN310")
    assert finding.site == "4"


def test_few_images_are_said_to_be_few() -> None:
    uneven = torch.cat([images(1, seed=s, offset=float(s % 5)) for s in range(100)])
    model = settle(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), uneven)
    (finding,) = found(diagnose(model, [uneven[:8]]), "BN311")
    assert finding.severity == "info"
    assert found(diagnose(model, [uneven]), "BN311") == []


# ── every rule, every model ──


@pytest.mark.parametrize("case", zoo.cases(without=("lazy",)))
def test_the_doctor_leaves_every_model_as_it_was(case: zoo.Case) -> None:
    model = case.settled()
    before, around = photograph(model), process()
    options = {"forward": case.forward, "output": case.output}
    for batches in (None, case.batches()):
        diagnose(model, batches, **options)
        assert differences(before, photograph(model)) == []
        assert process() == around


def test_every_rule_has_a_test_and_an_id_that_says_its_group() -> None:
    groups = {"BN1": 0, "BN2": 0, "BN3": 1, "BN4": 0, "BN5": 0}
    counted = ("BN410", "BN503")  # in a loop that is watched, else in a forward; beside a folded model
    for rule in catalogue().values():
        assert rule.id[:3] in groups
        assert rule.id in counted or (rule.passes() > 0) == bool(groups[rule.id[:3]]), rule.id


# ── against a checkpoint, and layers that lost something ──


def test_statistics_of_other_weights_are_found_against_the_file_and_estimated_anew() -> None:
    model = convs()
    file = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert found(diagnose(model, checkpoint=file), "BN203") == []
    model[-1].weight.data.mul_(2)  # a new head is no reason
    assert found(diagnose(model, checkpoint=file), "BN203") == []
    model[0].weight.data.mul_(3)
    (finding,) = found(diagnose(model, checkpoint=file), "BN203")
    assert (finding.severity, finding.value, finding.fix_) == ("warning", 2.0, None)
    batches = [images(100), images(100, seed=2)]
    (finding,) = found(diagnose(model, batches, checkpoint=file), "BN203")
    assert (finding.severity, finding.unit) == ("error", "source sd")
    assert finding.fix_ is not None
    undo = finding.fix_(model)
    assert found(diagnose(model, batches, checkpoint=file), "BN203") == []
    undo.restore_()
    freeze_(model)
    assert found(diagnose(model, batches, checkpoint=file), "BN203") == []


def test_new_weights_that_need_no_other_statistics_are_left_in_peace() -> None:
    model = convs()
    file = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[0].weight.data.mul_(1.001)
    assert found(diagnose(model, [images(100), images(100, seed=2)], checkpoint=file), "BN203") == []


def test_a_frozen_layer_that_moved_is_found_and_put_back() -> None:
    model = convs()
    file = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for norm in norms(model):
        norm.requires_grad_(False)
    assert found(diagnose(model, checkpoint=file), "BN205") == []
    model.train()
    model(images(50) + 3)
    model.eval()
    (finding,) = found(diagnose(model, checkpoint=file), "BN205")
    assert finding.severity == "error"
    assert finding.value > 0.05
    assert finding.fix_ is not None
    undo = finding.fix_(model)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in file.items() if "running" in n)
    assert found(diagnose(model, checkpoint=file), "BN205") == []
    undo.restore_()
    freeze_(model)
    assert found(diagnose(model, checkpoint=file), "BN205") == []


def test_activations_that_a_conversion_lost_are_found_and_called_again() -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.drop(super().forward(x)))

    model = nn.Sequential(nn.Conv2d(3, 6, 3), NormAct(6), nn.Conv2d(6, 6, 3), NormAct(6)).eval()
    x = images(4)
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not torch.equal(converted(x), expected)
    before = photograph(converted)
    (finding,) = found(diagnose(converted), "BN407")
    assert (finding.severity, finding.value, finding.site) == ("error", 2.0, "1")
    assert finding.fix_ is not None
    undo = finding.fix_(converted)
    assert torch.equal(converted(x), expected)
    assert torch.equal(copy.deepcopy(converted)(x), expected)
    assert found(diagnose(converted), "BN407") == []
    undo.restore_()
    undo.restore_()
    assert differences(before, photograph(converted)) == []
    with pytest.raises(UsageError, match="no such norm layer"):
        finding.fix_(nn.Sequential(nn.BatchNorm2d(3)))
