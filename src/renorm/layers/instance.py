"""Instance norm in the place of a batch norm."""

from __future__ import annotations

from typing import Any, ClassVar

from renorm.layers.group import Group


class Instance(Group):
    """`Group` with a group per channel: each channel of each image is normalised over its own positions.

    Features without positions have one value there, and come out as the bias alone. Ulyanov, Vedaldi and Lempitsky 2016.
    """

    name: ClassVar[str] = "instance"
    cites: ClassVar[str] = (
        "@article{ulyanov2016instance, title={Instance Normalization: The Missing Ingredient for Fast Stylization}, "
        "author={Ulyanov, Dmitry and Vedaldi, Andrea and Lempitsky, Victor}, journal={arXiv:1607.08022}, year={2016}}"
    )

    def __init__(self, num_features: int, **common: Any) -> None:
        super().__init__(num_features, groups=num_features, **common)
