"""Names of the figures of an evaluation; needs no settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

METRICS: Final[Mapping[str, str]] = {
    "accuracy": "accuracy",
    "accuracy_missing_wrong": "accuracy, missing as wrong",
    "precision_macro": "precision, macro",
    "recall_macro": "recall, macro",
    "f1_macro": "F1, macro",
    "precision_weighted": "precision, weighted",
    "recall_weighted": "recall, weighted",
    "f1_weighted": "F1, weighted",
    "kappa": "Cohen's kappa",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "spearman": "Spearman's rho",
    "alpha": "Krippendorff's alpha",
    "agreement": "share of equal values",
}
"""Names of figures, in the order in which they are shown."""

MISSING_CAUSES: Final[Mapping[str, str]] = {
    "failed": "failed",
    "no_value": "answered without a value",
    "tie": "a tie of the samples",
    "unfinished": "not ended",
}
"""Why an item has no answer to compare, in words."""
