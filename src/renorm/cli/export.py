"""`renorm export MODEL -o OUT`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from renorm.cli.base import option
from renorm.cli.subject import OnExample, notes
from renorm.said import follow, say

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class ExportModel(OnExample):
    """Write a model as a file that ships, folded, and check that the file gives the model's answers.

    The suffix is the format: .onnx, .pt2 (torch.export) or .safetensors. A file whose answers differ is not written, with
    --force or without.
    """

    name: ClassVar[str] = "export"
    example: ClassVar[str] = "renorm export timm:resnet50 --checkpoint resnet50.safetensors -o resnet50.onnx"

    output: str = option("", "the file to write: .onnx, .pt2 or .safetensors", short="-o", metavar="OUT", required=True)
    keep_norms: bool = option(False, "leave batch norms as they are")
    fixed_batch: bool = option(False, "write a file for the example's number of samples only")
    tolerance: float = option(1e-4, "largest difference allowed, as a share of the largest output")

    def run(self, screen: Screen) -> Report:
        from renorm.export import export, writable
        from renorm.report import folding
        from renorm.report.base import Report, Words

        writable(self.output, force=self.force)
        model = self.opened()
        loaded = model.checkpoint.sha256 if model.checkpoint else None
        made = export(
            model.module,
            self.output,
            self.batch(model),
            folds=not self.keep_norms,
            dynamic_batch=not self.fixed_batch,
            tolerance=self.tolerance,
            origin={"command": self.written(), "checkpoint": loaded},
            force=self.force,
        )
        text = say(
            "Run from the file, its outputs differ by at most {error:.1e} of the largest.", error=made.max_rel_error
        )
        if made.folded is not None:
            gone = len(made.folded.folded)
            text = follow(text, say("{count} batch norms are folded into their neighbours.", count=gone))
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=Words(
                text,
                "good",
                say("Written to {output}", output=self.output),
            ),
            blocks=() if made.folded is None else folding.blocks(made.folded),
            result={
                "output": self.output,
                "format": made.format,
                "bytes": made.path.stat().st_size,
                "max_rel_error": made.max_rel_error,
                "folded": None if made.folded is None else folding.result(made.folded),
            },
            notes=(*made.notes, *notes(model)),
            origin=self.origin_of(model, None),
        )
