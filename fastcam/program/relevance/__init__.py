"""The relevance engine: rules, composites, and the walk back through a program."""

from .composites import COMPOSITES, Composite, named
from .rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    MaxPool,
    Norm,
    Pass,
    Rap,
    Rectified,
    Rule,
    Weighted,
    WSquare,
    ZBox,
    ZPlus,
)
from .walk import Composer, Passed, RelevanceWalk, known, register_relevance_rule

__all__ = [
    "COMPOSITES",
    "AlphaBeta",
    "Composer",
    "Composite",
    "Epsilon",
    "Flat",
    "Gamma",
    "Gradient",
    "MaxPool",
    "Norm",
    "Pass",
    "Passed",
    "Rap",
    "Rectified",
    "RelevanceWalk",
    "Rule",
    "WSquare",
    "Weighted",
    "ZBox",
    "ZPlus",
    "known",
    "named",
    "register_relevance_rule",
]
