"""Layer norm over channels and positions in the place of a batch norm."""

from __future__ import annotations

from typing import Any, ClassVar

from renorm.layers.group import Group


class LayerNorm(Group):
    """`Group` with one group: each image is normalised over all its values, with a weight and bias per channel.

    Ba, Kiros and Hinton 2016, as ConvNets have it (torch's `nn.LayerNorm` has a weight per position too).
    """

    name: ClassVar[str] = "layer"
    cites: ClassVar[str] = (
        "@article{ba2016layer, title={Layer Normalization}, author={Ba, Jimmy Lei and Kiros, Jamie Ryan and Hinton, Geoffrey "
        "E}, journal={arXiv:1607.06450}, year={2016}}"
    )

    def __init__(self, num_features: int, **common: Any) -> None:
        super().__init__(num_features, groups=1, **common)
