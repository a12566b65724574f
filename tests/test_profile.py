"""The source's profile: are the class moments exact, is the file whole, is a wrong one refused?"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from renorm.errors import BatchError, CheckpointError, FileExists, ModelError, NoBatchNorm, UsageError
from renorm.moments import Moments
from renorm.profile import FLOOR, SMALL_BYTES, Profile, low_rank, profile
from tests.reference import equal_mix as reference

CLASSES = 3


def net() -> nn.Sequential:
    """Its first batch norm sees the input itself, so that what it must hold is known."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, CLASSES),
    )
    model[0].running_mean.uniform_(-1, 1)
    model[0].running_var.uniform_(0.5, 2)
    return model.eval()


def samples(count: int = 90, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose mean and spread depend on the class."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randn(count, 4, 6, 6, generator=rng)
    return images * (1 + 0.5 * labels.view(-1, 1, 1, 1)) + labels.view(-1, 1, 1, 1) * torch.tensor(
        [1.0, -1, 0, 3]
    ).view(1, -1, 1, 1), labels


def in_batches(images: Tensor, labels: Tensor | None = None, size: int = 32) -> list[object]:
    if labels is None:
        return list(images.split(size))
    return list(zip(images.split(size), labels.split(size), strict=True))


def test_what_is_believed_hangs_on_how_many_images_and_how_evenly_mixed() -> None:
    images, _ = samples(60)
    even, one = (
        profile(net(), in_batches(images, labels)) for labels in (torch.arange(60) % 3, torch.zeros(60).long())
    )
    assert even.evenness == pytest.approx(1)
    assert even.belief.tolist() == pytest.approx([0.4, 0.4, 0.4])
    assert (one.evenness, one.is_uneven, even.is_uneven) == (0, True, False)
    assert one.belief.tolist() == [0, 0, 0]


@pytest.mark.parametrize("mix", [(1.0, 0.0, 0.0), (0.2, 0.3, 0.5)])
def test_moments_at_any_class_mix_are_those_of_the_images(mix: tuple[float, ...]) -> None:
    images, labels = samples()
    made = profile(net(), in_batches(images, labels))
    got = made.at(torch.tensor(mix))["0"]
    mean, var = reference.at_mix(images.double().numpy(), labels.numpy(), np.array(mix))
    np.testing.assert_allclose(got.mean, mean, atol=1e-5)
    np.testing.assert_allclose(got.var, var, rtol=1e-5)


def test_at_its_own_mix_it_is_the_moments_of_all_images_together() -> None:
    images, labels = samples()
    keep = (labels != 2) | (torch.arange(len(labels)) < 30)  # an uneven mix
    made = profile(net(), in_batches(images[keep], labels[keep], size=7))
    got, want = made.at(made.prior)["0"], Moments.of(images[keep])
    np.testing.assert_allclose(got.mean, want.mean, atol=1e-5)
    np.testing.assert_allclose(got.var, want.var, rtol=1e-5)
    assert made.prior.tolist() == pytest.approx((torch.bincount(labels[keep]) / keep.sum()).tolist())


def test_a_large_mean_does_not_cancel() -> None:
    images, labels = samples()
    model = net()
    model[0].running_mean.fill_(2e4)
    got = profile(model, in_batches(images + 2e4, labels)).at(torch.tensor([1.0, 0, 0]))["0"]
    np.testing.assert_allclose(got.var, Moments.of((images + 2e4)[labels == 0]).var, rtol=1e-4)


def test_the_model_comes_out_bit_identical_and_in_its_modes() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    profile(model, in_batches(*samples()))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_confidence_and_accuracy_are_the_models_own() -> None:
    images, labels = samples()
    model = net()
    made = profile(model, in_batches(images, labels))
    with torch.no_grad():
        probabilities = model(images).softmax(1)
    assert made.accuracy == pytest.approx(float((probabilities.argmax(1) == labels).double().mean()))
    assert made.confidence == pytest.approx(float(probabilities.amax(1).mean()), abs=1e-6)
    assert made.samples == len(images)


def test_without_labels_classes_are_the_models_softmax() -> None:
    images, _ = samples()
    model = net()
    made = profile(model, in_batches(images))
    with torch.no_grad():
        want = model(images).softmax(1).sum(0)
    np.testing.assert_allclose(made.counts, want, rtol=1e-5)
    assert made.accuracy is None
    assert not made.labelled


def test_the_gap_is_that_of_the_data_and_not_of_their_number() -> None:
    """Fresh images half a standard deviation off: moved is 0.25, however few images show it."""
    model = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, CLASSES)).eval()
    found = []
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        found.append(profile(model, in_batches(torch.randn(40, 64, generator=rng) + 0.5)).gap("0"))
    assert np.mean(found) == pytest.approx(0.25, abs=0.02)


def test_data_that_show_no_gap_get_the_floor() -> None:
    images = torch.randn(4000, 4)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).eval()
    made = profile(model, in_batches(images, size=500))
    assert made.gaps["0"] < 0.01
    assert made.gap("0") == FLOOR
    assert made.gap("of no site") == FLOOR


def test_a_class_that_no_image_had_looks_like_the_average() -> None:
    images, labels = samples()
    keep = labels != 1
    made = profile(net(), in_batches(images[keep], labels[keep]))
    np.testing.assert_allclose(made.at(torch.tensor([0.0, 1, 0]))["0"].mean, Moments.of(images[keep]).mean, atol=1e-5)


def test_a_site_that_sees_no_row_per_sample_is_the_same_for_every_class() -> None:
    class Proposals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            flat = x.movedim(1, -1).flatten(0, -2)
            return self.head(self.norm(flat)).view(len(x), -1, CLASSES).mean(1)

    images, labels = samples()
    made = profile(Proposals(), in_batches(images, labels, size=90))
    one, other = (made.at(torch.eye(CLASSES)[k])["norm"] for k in (0, 2))
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-9)
    np.testing.assert_allclose(one.mean, Moments.of(images).mean, atol=1e-5)


@pytest.mark.parametrize("shape", [(90, 1), (90,)])
def test_one_logit_a_sample_is_two_classes(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1))
    images, labels = samples()
    made = profile(model, in_batches(images, labels.clamp_max(1), size=90), output=lambda found: found.reshape(shape))
    assert len(made.counts) == 2


def test_saved_and_loaded_it_says_the_same(tmp_path: Path) -> None:
    made = profile(net(), in_batches(*samples()))
    made.save(tmp_path / "net.profile")
    back = Profile.load(tmp_path / "net.profile")
    mix = torch.tensor([0.1, 0.2, 0.7])
    for name, want in made.at(mix).items():
        np.testing.assert_allclose(back.at(mix)[name].mean, want.mean, atol=1e-5)
        np.testing.assert_allclose(back.at(mix)[name].var, want.var, rtol=1e-4)
        assert back.gap(name) == pytest.approx(made.gap(name), rel=1e-6)
    assert (back.samples, back.labelled, back.accuracy, back.confidence) == (90, True, made.accuracy, made.confidence)
    with pytest.raises(FileExists, match="stands there already"):
        made.save(tmp_path / "net.profile")
    made.save(tmp_path / "net.profile", force=True)


def test_a_thousand_classes_of_resnet_50_fit_in_five_megabytes(tmp_path: Path) -> None:
    """53 layers, 26,560 channels, 1,000 classes: class means that follow 24 directions, as related classes do, and noise."""
    channels = 26_560
    rng = torch.Generator().manual_seed(0)
    excess = torch.randn(1000, 24, generator=rng) @ torch.randn(24, 2 * channels, generator=rng) / 24**0.5 * 0.3
    excess += 0.02 * torch.randn(1000, 2 * channels, generator=rng)
    scores, directions = low_rank(excess)
    one = Moments(math.inf, torch.zeros(channels).double(), torch.ones(channels).double())
    made = Profile(
        held={"norm": one},
        gaps={"norm": 0.0},
        counts=torch.ones(1000).double(),
        base=torch.cat([torch.zeros(channels), torch.full((channels,), 50.0)]).double(),
        scores=scores,
        directions=directions,
        samples=1000,
        labelled=True,
        accuracy=0.5,
        confidence=0.5,
    )
    made.save(tmp_path / "large.profile")
    assert (tmp_path / "large.profile").stat().st_size <= 5_000_000
    back = Profile.load(tmp_path / "large.profile")
    mix = torch.zeros(1000).double()
    mix[7] = 1
    off = back.at(mix)["norm"].mean - excess[7, :channels]
    assert float(off.square().mean().sqrt()) < 0.025  # of a spread of 0.3: the noise, which no few directions hold


def test_few_classes_are_kept_exactly_and_many_as_directions() -> None:
    few, many = torch.randn(10, 400), torch.randn(600, 4000)
    scores, directions = low_rank(few)
    assert torch.equal(scores @ directions, few)
    scores, directions = low_rank(many)
    assert scores.shape[1] < 600
    assert 2 * (scores.numel() + directions.numel()) <= SMALL_BYTES


def test_a_model_of_other_sites_is_refused_by_name() -> None:
    made = profile(net(), in_batches(*samples()))
    made.check(net())
    wider = net()
    wider[3] = nn.BatchNorm2d(6)
    with pytest.raises(ModelError, match="'3' with 5 channels; this Sequential has 6 channels there"):
        made.check(wider)
    with pytest.raises(ModelError, match="has no norm layer of that name"):
        made.check(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (torch.full((90,), 3), "90 of torch.int64, 3 to 3"),
        (torch.full((90,), -1), "-1 to -1"),
        (torch.zeros(90), "torch.float32"),
        (torch.zeros(90, 2).long(), "180 of"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: Tensor, found: str) -> None:
    with pytest.raises(BatchError, match=f"90 class numbers from 0 to 2; got .*{found}"):
        profile(net(), [(samples()[0], labels)])


def test_labelled_and_unlabelled_batches_together_are_refused() -> None:
    images, labels = samples()
    with pytest.raises(BatchError, match="batch 1 comes without labels"):
        profile(net(), [(images, labels), images])


def test_outputs_without_one_class_a_sample_are_refused() -> None:
    with pytest.raises(UsageError, match=r"needs logits \(N, K\); got \(90, 4, 6, 6\) for 90 samples"):
        profile(nn.Sequential(nn.BatchNorm2d(4)), [samples()[0]])


def test_a_model_without_batch_norm_is_refused() -> None:
    with pytest.raises(NoBatchNorm, match="profile needs batch norm"):
        profile(nn.Linear(4, 3), [torch.zeros(2, 4)])


def test_files_that_are_no_profile_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was to be read from"):
        Profile.load(tmp_path / "absent")
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(CheckpointError, match="was to be read from"):
        Profile.load(tmp_path / "text")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="its format is None"):
        Profile.load(tmp_path / "other.safetensors")
