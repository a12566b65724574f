"""BN303: the inputs were prepared in another way than in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import Said, follow, say
from renorm.suspects import START, Verdict


@dataclass(frozen=True, kw_only=True)
class WrongInput(Rule):
    """One usual mistake in preprocessing, taken back, makes the shift vanish; see `suspects` for how that is judged.

    Statistics estimated on wrong inputs would hide the mistake: where this is found, recalibration is not offered.
    """

    id: ClassVar[str] = "BN303"
    title: ClassVar[str] = say("wrong preprocessing")
    needs: ClassVar[tuple[str, ...]] = ("suspect",)
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")

    def check(self, facts: Facts) -> Iterator[Finding]:
        verdict = facts.suspect
        if verdict is None:
            return
        message, advice = MISTAKES[verdict.name]
        yield Finding(
            rule=self.id,
            site=verdict.site,
            severity="error",
            value=verdict.before,
            unit=say("source sd, mean over layers"),
            limit=START,
            message=follow(message, self._evidence(verdict)),
            advice=advice,
        )

    @staticmethod
    def _evidence(verdict: Verdict) -> Said:
        told = {"before": verdict.before, "after": verdict.after}
        if verdict.surer is None:
            return say("With that taken back the distance falls from {before:.3g} to {after:.3g}.", **told)
        return say(
            "With that taken back the distance falls from {before:.3g} to {after:.3g}, and the model is surer of its "
            "answers by {surer:.0%}.",
            surer=verdict.surer,
            **told,
        )


_AGAIN = say("Correct the transform and ask the doctor again; do not recalibrate, it would hide the mistake.")
MISTAKES: dict[str, tuple[str, str]] = {
    "not divided by 255": (say("The pixels were not divided by 255."), _AGAIN),
    "divided by 255 twice": (say("The pixels were divided by 255 twice, or the model wants them in 0 to 255."), _AGAIN),
    "rows and channels mixed up": (
        say(
            "Rows and channels are mixed up: images (H, W, C) were reshaped to (C, H, W) where they had to be permuted."
        ),
        _AGAIN,
    ),
    "channels in the order BGR": (say("Red and blue are swapped: the images are BGR, as OpenCV reads them."), _AGAIN),
    "colours inverted": (say("The colours are inverted: black stands for white."), _AGAIN),
    "normalised twice": (say("Mean and sd were taken off twice."), _AGAIN),
    "not normalised": (say("The pixels were divided by 255, but mean and sd were not taken off."), _AGAIN),
    "neither divided by 255 nor normalised": (
        say("The pixels are as in the file: neither divided by 255, nor were mean and sd taken off."),
        _AGAIN,
    ),
    "normalised without dividing by 255": (
        say("Mean and sd were taken off pixels that had not been divided by 255."),
        _AGAIN,
    ),
    "divided by 255 twice, then normalised": (
        say("The pixels were divided by 255 twice, then mean and sd taken off."),
        _AGAIN,
    ),
    "normalised as for ImageNet": (
        say("The pixels were normalised for ImageNet, which this model does not want."),
        _AGAIN,
    ),
    "normalised to [-1, 1]": (say("The pixels were normalised to [-1, 1], which this model does not want."), _AGAIN),
    "not resized": (say("The images have another size than the model was trained on, and were not resized."), _AGAIN),
}
