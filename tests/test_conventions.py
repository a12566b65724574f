"""conventions: other libraries' momentum and eps become torch's, and a model that shows them unconverted is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from renorm.conventions import CONVENTIONS, foreign_conventions, to_torch
from renorm.errors import UnknownName, UsageError
from renorm.models import load_model, open_model
from renorm.sites import find_sites
from tests import zoo


@given(momentum=st.floats(0, 1), mean=st.floats(-5, 5))
def test_a_converted_momentum_moves_the_statistics_as_the_source_would(momentum: float, mean: float) -> None:
    layer = nn.BatchNorm1d(1, **to_torch("keras", momentum, 1e-3)).double()
    layer(torch.tensor([[mean - 1.0], [mean + 1.0]], dtype=torch.float64))
    keras = 0.0 * momentum + mean * (1.0 - momentum)
    assert layer.running_mean is not None
    torch.testing.assert_close(layer.running_mean.item(), keras, rtol=1e-9, atol=1e-9)


def test_keras_layers_agree_with_the_conversion() -> None:
    model = zoo.named("keras-within-torch").build()
    theirs, mine = find_sites(model)[1], find_sites(model)[0]
    assert theirs.momentum == pytest.approx(to_torch("keras")["momentum"])
    assert theirs.eps == to_torch("keras")["eps"]
    assert (mine.momentum, mine.eps) == tuple(to_torch("torch").values())


def test_defaults() -> None:
    assert to_torch("keras") == to_torch("tensorflow") == {"momentum": 0.01, "eps": 1e-3}
    assert to_torch("flax", momentum=0.9) == {"momentum": 0.1, "eps": 1e-5}
    assert to_torch("torch", 0.3, 1e-4) == {"momentum": 0.3, "eps": 1e-4}


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UnknownName, match="no library 'kera'; did you mean 'keras'"):
        to_torch("kera")
    with pytest.raises(UsageError, match=r"momentum is a share in \[0, 1\]; keras's was said to be 1.1"):
        to_torch("keras", 1.1)
    with pytest.raises(UsageError, match="eps is added to a variance and at least 0; flax's was said to be -1"):
        to_torch("flax", 0.9, -1.0)
    assert set(CONVENTIONS) == {"torch", "keras", "tensorflow", "flax"}


def test_a_copied_momentum_is_told_with_the_right_one() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.99), nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.9, eps=1e-3)
    )
    (note,) = foreign_conventions(model)
    assert note.startswith(
        "2 batch norms, '0' first, have momentum 0.9, 0.99: in torch that is the weight of the new batch"
    )
    assert "Set it to 0.1, 0.01 before training" in note
    assert "eps is torch's 1e-05, where TensorFlow and Keras take 0.001" in note
    model[0].eps = 1e-3
    assert "eps" not in foreign_conventions(model)[0]


@pytest.mark.parametrize("case", zoo.cases())
def test_no_model_of_the_zoo_is_suspected(case: zoo.Case) -> None:
    assert foreign_conventions(case.build()) == ()


def test_an_opened_model_carries_the_note_and_a_loaded_one_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "ported.py"
    file.write_text("from torch import nn\n\ndef net():\n    return nn.Sequential(nn.BatchNorm2d(3, momentum=0.99))\n")
    assert any("have momentum 0.99" in note for note in open_model(f"{file}:net").notes)
    load_model(f"{file}:net")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("renorm", "WARNING")
    assert "1 batch norms, '0' first, have momentum 0.99" in record.getMessage()
