"""How good attribution maps are: faithfulness, localisation, robustness, as functions of models, images and maps."""

from .accumulate import Mean
from .agreement import rank_correlation, shap_agreement, sparsity
from .confidence import Confidence, average_drop, average_drop_in_deletion, confidence, increase_in_confidence
from .curves import Curve, deletion_auc, insertion_auc, insertion_deletion, most_relevant_first, radial_canvas
from .localisation import average_precision, energy_pointing, localisation_iou, outside_inside_ratio, pointing_game
from .randomisation import Randomisation, cascading_randomisation
from .road import road, road_curve
from .sensitivity import max_sensitivity
from .stability import map_iou, map_stability

__all__ = [
    "Confidence",
    "Curve",
    "Mean",
    "Randomisation",
    "average_drop",
    "average_drop_in_deletion",
    "average_precision",
    "cascading_randomisation",
    "confidence",
    "deletion_auc",
    "energy_pointing",
    "increase_in_confidence",
    "insertion_auc",
    "insertion_deletion",
    "localisation_iou",
    "map_iou",
    "map_stability",
    "max_sensitivity",
    "most_relevant_first",
    "outside_inside_ratio",
    "pointing_game",
    "radial_canvas",
    "rank_correlation",
    "road",
    "road_curve",
    "shap_agreement",
    "sparsity",
]
