"""Rules and composites for `method="lrp"`.

import fastcam
from fastcam.relevance import Composite, Epsilon, Gamma, ZPlus

mine = Composite(conv=ZPlus(), linear=Epsilon(), names={"layer4.*": Gamma(gamma=0.1)})
result = fastcam.attribute(model, images, "lrp", composite=mine)
"""

from fastcam.program.relevance import (
    COMPOSITES,
    AlphaBeta,
    Composite,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    MaxPool,
    Norm,
    Pass,
    Raised,
    Rectified,
    Rule,
    WSquare,
    ZBox,
    ZPlus,
    named,
)

__all__ = [
    "COMPOSITES",
    "AlphaBeta",
    "Composite",
    "Epsilon",
    "Flat",
    "Gamma",
    "Gradient",
    "MaxPool",
    "Norm",
    "Pass",
    "Raised",
    "Rectified",
    "Rule",
    "WSquare",
    "ZBox",
    "ZPlus",
    "named",
]
