"""`renorm doctor MODEL [DATA]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from renorm.cli.base import argument, option
from renorm.cli.subject import DATA, MODEL, OnModel, notes, recorded
from renorm.errors import UsageError
from renorm.said import listed, many, say

if TYPE_CHECKING:
    from torch import Tensor, nn

    from renorm.cli.screen import Screen
    from renorm.datasets.base import Dataset
    from renorm.doctor import Diagnosis
    from renorm.known import Sorted
    from renorm.models import Model
    from renorm.report.base import Report, Words
    from renorm.rules.base import Finding


@dataclass(frozen=True, kw_only=True)
class Doctor(OnModel):
    """Say what is wrong with a model's norm layers, and on this data: worst first.

    Without DATA the model alone is looked at; without MODEL, or where it is a .onnx, .pt2 or weights file, the file alone,
    and no code of the model is needed. Exit code 0: nothing as bad as --fail-on; 1: something was found. With --fix
    what can be mended is, the weights are written to OUT, and the code is that of the mended model. Rules: docs/rules.md.
    """

    name: ClassVar[str] = "doctor"
    example: ClassVar[str] = "renorm doctor nets.py:resnet20 --checkpoint resnet20.safetensors photos/"

    format: Literal["table", "json", "html", "sarif"] = option(  # type: ignore[assignment]
        "table", "how to print the answer"
    )
    tells: ClassVar[bool] = True
    model: str = argument(f"{MODEL}; or a .onnx, .pt2 or weights file", required=False)
    data: str = argument(f"{DATA}; no labels needed", required=False)
    source: str = option("", "a profile of the source, made by renorm profile", metavar="FILE")
    ranks: str = option("", "checkpoints of the other ranks of the same run: 'run/rank*.pt'", metavar="PATTERN")
    folded: str = option(
        "", "the model folded, to be compared: a file of renorm fold, or another MODEL", metavar="FILE"
    )
    passes: float | None = option(None, "the most passes over DATA to spend; what takes more is not asked, and said")
    top: int = option(10, "how many batch norms to list")
    fix: bool = option(False, "mend what can be mended, and write the weights to OUT")
    output: str = option("", "the mended weights: .safetensors, .pt or .pth", short="-o", metavar="OUT")
    fail_on: Literal["error", "warning", "never"] = option("warning", "the mildest finding that makes the exit code 1")
    ignore: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"help": 'leave out a rule, and say why: --ignore.BN105 "trained without"', "metavar": "REASON"},
    )
    baseline: str = option("", "leave out what an earlier --format json report has", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model and not self.checkpoint:
            raise UsageError(
                f"renorm doctor needs MODEL, or --checkpoint FILE alone, and neither was given. For example:\n"
                f"  {self.example}\nrenorm doctor --help lists everything."
            )
        if self.file and (self.data or self.fix or self.source or self.folded or (self.model and self.checkpoint)):
            wanted = {"DATA": self.data, "--fix": self.fix, "--source": self.source, "--folded": self.folded}
            named = next((name for name, given in wanted.items() if given), "--checkpoint")
            raise UsageError(
                f"renorm doctor was given the file {self.file} without the model's code, and {named}, which needs the model. "
                f"Name the model too, for example:\n  {self.example}"
            )

    @property
    def file(self) -> str:
        """The file that is looked at alone; "" where the model's code is at hand."""
        from renorm.stored import GRAPHS, WEIGHTS

        return (self.model or self.checkpoint) if not self.model or self.model.endswith((*GRAPHS, *WEIGHTS)) else ""

    def run(self, screen: Screen) -> Report:
        if self.file:
            return self._alone()
        return self._with_model(screen)

    def _alone(self) -> Report:
        from renorm.doctor import diagnose_file
        from renorm.files import sha256
        from renorm.known import read_baseline, sort_out

        before = read_baseline(self.baseline) if self.baseline else None
        sort_out((), ignore=self.ignore)
        diagnosis = diagnose_file(self.file, ranks=self._ranks())
        known = sort_out(diagnosis.findings, ignore=self.ignore, baseline=before)
        origin = self.origin(checkpoint=sha256(self.file)) if self.keeps else {}
        return self._report(diagnosis, known, self.file, notes=diagnosis.notes, origin=origin)

    def _with_model(self, screen: Screen) -> Report:
        from renorm.checkpoints import writable
        from renorm.known import read_baseline, sort_out
        from renorm.provenance import fingerprint

        if self.fix != bool(self.output):
            raise UsageError("renorm doctor --fix needs -o OUT, the weights to write, and -o OUT needs --fix.")
        if self.fix:
            writable(self.output, force=self.force)
        before = read_baseline(self.baseline) if self.baseline else None
        sort_out((), ignore=self.ignore)
        model = self.opened()
        dataset = self.dataset(self.data, model) if self.data else None
        origin = fingerprint(model.module) if self.fix else ""
        diagnosis = self._diagnosed(screen, model, dataset)
        known = sort_out(diagnosis.findings, ignore=self.ignore, baseline=before)
        left = known.new
        told: list[str] = []
        extra: dict[str, Any] = {}
        if self.fix:
            mended, lost = self._mend(model, known.new, origin, dataset)
            left = sort_out(self._diagnosed(screen, model, dataset).findings, ignore=self.ignore, baseline=before).new
            told = self._about(mended, lost)
            written = self.output if origin != fingerprint(model.module) else None
            extra = {"mended": [_named(f) for f in mended], "output": written}
        made = self._report(
            diagnosis,
            known,
            self.model,
            notes=(*told, *diagnosis.notes, *notes(model, dataset)),
            origin=self.origin_of(model, dataset),
            left=left,
        )
        return replace(made, result={**made.result, **extra})

    def _report(
        self,
        diagnosis: Diagnosis,
        known: Sorted,
        subject: str,
        *,
        notes: Sequence[str],
        origin: Mapping[str, Any],
        left: tuple[Finding, ...] | None = None,
    ) -> Report:
        """The report on what is `known`; `left` is what still counts for the exit code, where some was mended."""
        from renorm.report import diagnosis as page
        from renorm.report.base import Report

        shown = replace(diagnosis, findings=known.new)
        counts = known.new if left is None else left
        return Report(
            command=self.name,
            model=subject,
            data=self.data,
            verdict=_nothing_new(known) or page.verdict(shown),
            blocks=page.blocks(shown, rows=self.top, judged=diagnosis.findings),
            result=page.result(shown) | self._left_out(known),
            notes=(*_said(known, self.ignore), *notes),
            origin=origin,
            exit_code=1 if any(f.severity in FAILS[self.fail_on] for f in counts) else 0,
        )

    def _diagnosed(self, screen: Screen, model: Model, dataset: Dataset | None) -> Diagnosis:
        from renorm.doctor import diagnose
        from renorm.profile import Profile

        return diagnose(
            model.module,
            screen.watched(dataset.batches, "looking") if dataset else None,
            Profile.load(self.source) if self.source else None,
            checkpoint=self._weights(),
            domains=dataset.groups if dataset else None,
            ranks=self._ranks(),
            folded=self._folded(model),
            passes=self.passes,
            **self.calling(),
        )

    def _weights(self) -> str | Mapping[str, Tensor] | None:
        """The checkpoint; where its columns are not to count, its tensors alone."""
        from renorm.checkpoints import read

        return read(self.checkpoint) if self.checkpoint and self.columns == "as-is" else self.checkpoint or None

    def _folded(self, model: Model) -> nn.Module | None:
        """The folded model: another MODEL, or this one in the form that the file tells."""
        if not self.folded:
            return None
        if not self.data:
            raise UsageError("renorm doctor --folded compares answers, and needs DATA.")
        if ":" in self.folded:
            from renorm.models import open_model

            return open_model(self.folded).module
        from copy import deepcopy

        from renorm.fold import load_folded_

        folded = deepcopy(model.module)
        load_folded_(folded, self.folded)
        return folded

    def _ranks(self) -> list[str] | None:
        found = sorted(glob(self.ranks))
        if self.ranks and not found:
            raise UsageError(f"--ranks {self.ranks} names no file. Quote the pattern, and look where it leads.")
        return found or None

    def _mend(
        self, model: Model, findings: tuple[Finding, ...], origin: str, dataset: Dataset | None
    ) -> tuple[list[Finding], list[Finding]]:
        """The findings whose fix is in the file, and those whose fix changed only what a file of weights cannot hold."""
        from renorm.checkpoints import write
        from renorm.doctor import mend_
        from renorm.provenance import fingerprint, provenance

        mended: list[Finding] = []
        lost: list[Finding] = []
        before = origin
        seen: dict[int, list[Finding]] = {}
        for finding in findings:
            if finding.fix_ is not None and id(finding.fix_) in seen:
                seen[id(finding.fix_)].append(finding)
            elif finding.fix_ is not None:
                mend_(model.module, [finding])
                after = fingerprint(model.module)
                seen[id(finding.fix_)] = mended if after != before else lost
                seen[id(finding.fix_)].append(finding)
                before = after
        if before != origin:
            loaded = model.checkpoint.sha256 if model.checkpoint else None
            data = dataset.fingerprint if dataset else None
            more = recorded(model, dataset)
            made = provenance(command=self.written(), model=origin, data=data, checkpoint=loaded, **more)
            write(model.module, self.output, provenance=made, force=self.force)
        return mended, lost

    def _about(self, mended: list[Finding], lost: list[Finding]) -> list[str]:
        said: list[str] = []
        if mended:
            said.append(say("mended, and written to {output}: {findings}", output=self.output, findings=_list(mended)))
        if lost:
            said.append(
                say(
                    "weights cannot hold these; do in your code what each finding says: {findings}",
                    findings=_list(lost),
                )
            )
        if not mended:
            said.append(
                say("nothing was found that mended weights would hold; {output} was not written", output=self.output)
            )
        return said

    def _left_out(self, known: Sorted) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if self.ignore:
            out["ignored"] = [_named(f) | {"reason": self.ignore[f.rule]} for f in known.ignored]
        if self.baseline:
            out["in_baseline"] = [_named(f) for f in known.old]
        return out


FAILS: Mapping[str, tuple[str, ...]] = {"error": ("error",), "warning": ("error", "warning"), "never": ()}


def _nothing_new(known: Sorted) -> Words | None:
    """The verdict where all that was found is known; None where page's own verdict holds."""
    from renorm.report.base import Words

    left_out = len(known.ignored) + len(known.old)
    if known.new or not left_out:
        return None
    text = many(
        left_out,
        "{count:,} finding is known (ignored for a reason, or in the baseline), and there is no other.",
        "{count:,} findings are known (ignored for a reason, or in the baseline), and there is no other.",
    )
    return Words(text, "plain", say("Nothing new"))


def _named(finding: Finding) -> dict[str, Any]:
    return {"rule": finding.rule, "site": finding.site}


def _list(findings: list[Finding]) -> str:
    return listed(say("{rule} at {site}", rule=f.rule, site=f.site or say("the model itself")) for f in findings)


def _said(known: Sorted, reasons: Mapping[str, str]) -> list[str]:
    rules = dict.fromkeys(f.rule for f in known.ignored)
    said: list[str] = [say("{rule} is ignored: {reason}", rule=rule, reason=reasons[rule]) for rule in rules]
    if known.old:
        count = len(known.old)
        said.append(many(count, "{count:,} finding is in the baseline", "{count:,} findings are in the baseline"))
    return said
