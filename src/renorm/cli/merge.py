"""`renorm merge FILE … -o OUT`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, ClassVar

from renorm.cli.base import Command, arguments, option

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class Merge(Command):
    """Pool the moments that several sites measured of one model, as if one had read the data of all.

    The files are those of renorm observe, all with the same --under. Which part of the result is exact is said.
    """

    name: ClassVar[str] = "merge"
    example: ClassVar[str] = "renorm merge site-a.moments site-b.moments -o both.moments"

    files: tuple[str, ...] = arguments("two or more files of moments, made by renorm observe")
    output: str = option("", "the moments to write", short="-o", metavar="FILE", required=True)

    def run(self, screen: Screen) -> Report:
        from renorm.errors import RenormError, UsageError
        from renorm.files import refuse_existing
        from renorm.observation import Observation
        from renorm.report import moments as page
        from renorm.report.base import Report

        if len(self.files) < 2:
            raise UsageError(f"renorm merge pools two files or more; {self.files[0]} alone is pooled already.")
        target = refuse_existing(self.output, force=self.force)
        parts = {file: Observation.load(file) for file in self.files}

        def pool(both: Observation, file: str) -> Observation:
            try:
                return both.merge(parts[file])
            except RenormError as error:
                raise type(error)(f"{file}: {error}") from error

        both = reduce(pool, self.files[1:], parts[self.files[0]])
        both.save(target, command=self.written(), force=self.force)
        return Report(
            command=self.name,
            model="",
            data=" ".join(self.files),
            verdict=page.verdict(both, output=self.output),
            blocks=(page.parts(both, parts),),
            result=page.result(both) | {"output": self.output},
            notes=(both.caveat,) if both.caveat else (),
        )
