"""`renorm fold MODEL -o OUT`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from renorm.cli.base import option
from renorm.cli.subject import OnExample, notes

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class FoldNorms(OnExample):
    """Absorb batch norms into the layers beside them, prove it on an example, and write the weights.

    What cannot be folded stays, with the reason. Give the weights with --checkpoint to any command, or renorm.load_folded_ in
    Python; for a file that runs by itself see renorm export. Exit code 0: written; 1: nothing could be folded, nothing was
    written.
    """

    name: ClassVar[str] = "fold"
    example: ClassVar[str] = "renorm fold timm:resnet50 --checkpoint resnet50.safetensors -o folded.safetensors"

    output: str = option(
        "", "the weights to write: .safetensors, .pt or .pth", short="-o", metavar="OUT", required=True
    )

    def run(self, screen: Screen) -> Report:
        from renorm.checkpoints import writable, write
        from renorm.fold import fold
        from renorm.provenance import fingerprint, provenance
        from renorm.report import folding as page
        from renorm.report.base import Report

        target = writable(self.output, force=self.force)
        model = self.opened()
        folded = fold(model.module, self.batch(model), device=self.device or None, channels_last=self.channels_last)
        if folded.folded:
            loaded = model.checkpoint.sha256 if model.checkpoint else None
            made = provenance(
                command=self.written(),
                model=fingerprint(model.module),
                data=None,
                checkpoint=loaded,
                folded=folded.folded,
                kept=folded.kept,
            )
            write(folded.model, target, provenance=made, force=self.force)
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=page.verdict(folded, output=self.output),
            blocks=page.blocks(folded),
            result=page.result(folded) | {"output": self.output if folded.folded else None},
            notes=notes(model),
            origin=self.origin_of(model, None),
            exit_code=0 if folded.folded else 1,
        )
