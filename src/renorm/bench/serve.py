"""Suite `serve`: sixteen domains in one batch, beside a batch of one domain; and whether each sample is answered alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from renorm.adapters import load_adapter_, save_adapter
from renorm.bench.base import Cell, Row, Suite
from renorm.bench.markdown import table as markdown
from renorm.errors import require
from renorm.serve import serve_adapters
from renorm.sites import find_sites, parameters_of
from renorm.split import split

__all__ = ["Serve"]

DOMAINS = 16
NETWORKS = {  # side of the images
    "quick": {
        "resnet18": 128,
        "resnet50": 128,
        "efficientnet_b0": 128,
        "convnext_atto": 128,
        "vit_tiny_patch16_224": 224,
    },
    "full": {
        **{name: 224 for name in ("resnet18", "resnet50", "mobilenetv3_large_100", "efficientnet_b0", "densenet121")},
        **{name: 224 for name in ("convnext_tiny", "vit_tiny_patch16_224", "vit_base_patch16_224")},
    },
}
TURNS = {"quick": 5, "full": 15}
RATIO, APART = 1.15, 1e-5


class Serve(Suite):
    """Processor seconds of a forward, in turns within a cell: the base, one domain in the batch, sixteen of them."""

    name: ClassVar[str] = "serve"
    revision: ClassVar[int] = 1
    timed: ClassVar[bool] = True

    def cells(self) -> Iterator[Cell]:
        for network in NETWORKS[self.size]:
            for layout in ("plain", "channels last"):
                for seed in range(self.seeds):
                    yield Cell.of(on=network, layout=layout, seed=seed)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        timm: Any = require("timm", extra="images", purpose="the networks of this suite")
        torch.manual_seed(cell["seed"])
        model: nn.Module = timm.create_model(cell["on"], pretrained=False, num_classes=10).eval()
        side = NETWORKS[self.size][cell["on"]]
        images = torch.randn(DOMAINS, 3, side, side)
        if cell["layout"] == "channels last":
            model = model.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        with TemporaryDirectory() as folder, torch.no_grad():
            return _measured(model, images, _adapters(model, Path(folder)), turns=TURNS[self.size])

    def table(self, rows: Sequence[Row]) -> str:
        lines = []
        for on, layout in dict.fromkeys((row.cell["on"], row.cell["layout"]) for row in rows):
            here = [row for row in rows if (row.cell["on"], row.cell["layout"]) == (on, layout)]
            mixed, base = ([row.values["domains"] / row.values[way] for row in here] for way in ("one", "base"))
            apart = max(row.values["apart"] for row in here)
            holds = np.median(base) <= RATIO and apart <= APART
            lines.append([on, layout, _spread(mixed), _spread(base), f"{apart:.1e}", "yes" if holds else "no"])
        columns = ("network", "layout", "of one served domain", "of the model itself", "apart", "reached")
        return "\n".join([ABOUT, markdown(columns, lines)])


ABOUT = f"""\
A batch of {DOMAINS} random images, each of a domain of its own, through `serve_adapters`, as a multiple of the time of the
same batch when all are of one domain: served likewise, or by the model itself with that domain's adapter. Processor time, the
least of a few turns within a cell, whose ways take turns; median over cells with the smallest and the largest. *apart*: the
largest difference of a sample's output from its own domain's alone, relative to the largest output. Targets: at most
{RATIO} of the model itself, at most {APART:.0e} apart. Norm layers and heads differ by domain, weights are random.
"""


def _adapters(model: nn.Module, folder: Path) -> dict[str, Path]:
    """Files of domains that hold other norm layers and another head each; the model comes back as it was."""
    kept = deepcopy(model.state_dict())
    parts, files = split(model), {}
    for number in range(DOMAINS):
        for site in find_sites(model):
            for tensor in (*site.affine.values(), *(site.tensors or ())):
                tensor.add_(0.2 * torch.rand_like(tensor))
        for name, parameter in parameters_of(model).items():
            if parts.is_head(name):
                parameter.add_(0.1 * torch.randn_like(parameter))
        files[f"domain {number}"] = folder / f"{number}.safetensors"
        save_adapter(model, files[f"domain {number}"])
        model.load_state_dict(kept)
    return files


def _measured(model: nn.Module, images: Tensor, files: Mapping[str, Path], *, turns: int) -> dict[str, float]:
    served = serve_adapters(model, files)
    every = served.ids(list(files))
    together = served(images, domains=every)
    apart = 0.0
    for image, answer, path in zip(images, together, files.values(), strict=True):
        adapter = load_adapter_(model, path)
        apart = max(apart, float((model(image[None])[0] - answer).abs().max()))
        adapter.restore_()
    ways: dict[str, Callable[[], Any]] = {
        "base": lambda: model(images),
        "one": lambda: served(images, domains=torch.zeros_like(every)),
        "domains": lambda: served(images, domains=every),
    }
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(turns):
        for way, run in ways.items():
            start = process_time()
            run()
            seconds[way] = min(seconds[way], process_time() - start)
    return {**seconds, "apart": apart / float(together.abs().max())}


def _spread(ratios: Sequence[float]) -> str:
    return f"{np.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
