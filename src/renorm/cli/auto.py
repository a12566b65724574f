"""`renorm auto MODEL DATA -o OUT`."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from renorm.cli.base import option
from renorm.cli.recommend import OnTarget
from renorm.cli.subject import notes, recorded

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class Auto(OnTarget):
    """The whole way: diagnose, try what may help, do the best of it, say how far the answers moved, and write the weights.

    Exit code 0: written; 1: nothing was better than the model as it is, and nothing was written.
    """

    name: ClassVar[str] = "auto"
    example: ClassVar[str] = "renorm auto nets.py:resnet20 --checkpoint resnet20.safetensors photos/ -o new.safetensors"

    output: str = option(
        "", "the weights to write: .safetensors, .pt or .pth", short="-o", metavar="OUT", required=True
    )

    def run(self, screen: Screen) -> Report:
        from renorm.checkpoints import writable, write
        from renorm.cite import cite
        from renorm.doctor import diagnose
        from renorm.profile import Profile
        from renorm.provenance import fingerprint, provenance
        from renorm.report import diagnosis as diagnoses
        from renorm.report import gap as gaps
        from renorm.report import plan as page
        from renorm.report.base import Report, Words
        from renorm.said import follow, say
        from renorm.verify import verify

        target = writable(self.output, force=self.force)
        model = self.opened()
        dataset = self.dataset(self.data, model)
        known = Profile.load(self.source) if self.source else None
        origin = fingerprint(model.module)
        batches = screen.watched(dataset.batches, "looking")
        diagnosis = diagnose(model.module, batches, known, checkpoint=self.checkpoint or None, **self.calling())
        plan = self.plan(screen, model, dataset)
        found = diagnoses.verdict(diagnosis)
        said = page.verdict(plan)
        blocks = [Words(found.text, found.tone, found.title), *page.blocks(plan)]
        result = {
            "diagnosis": diagnoses.result(diagnosis),
            "plan": page.result(plan),
            "output": None,
            "cite": cite(plan),
        }
        changed = plan.best.verb != "leave"
        if changed:
            before = deepcopy(model.module)
            plan.apply_(model.module)
            calling = {key: value for key, value in self.calling().items() if key == "device"}
            gap = verify(before, model.module, plan.batches, **calling)
            blocks += [gaps.verdict(gap), gaps.table(gap)]
            data, loaded = dataset.fingerprint, model.checkpoint.sha256 if model.checkpoint else None
            more = recorded(model, dataset)
            made = provenance(command=self.written(), model=origin, data=data, checkpoint=loaded, **more)
            write(model.module, target, provenance=made, force=self.force)
            result |= {"gap": gaps.result(gap), "output": self.output}
            written = say("Written to {output}.", output=self.output)
        else:
            written = say("Nothing was written.")
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=Words(follow(said.text, written), said.tone, said.title),
            blocks=tuple(blocks),
            result=result,
            notes=notes(model, dataset),
            origin=self.origin_of(model, dataset, fingerprinted=origin),
            exit_code=0 if changed else 1,
        )
