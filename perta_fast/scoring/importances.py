"""The importances that weigh a setting: of forget and retain, or their ratio. It needs no torch."""

from collections.abc import Mapping
from pathlib import Path

from perta_fast.importance.ratio import ImportanceRatio, located
from perta_fast.importance.store import Importance, ImportanceMetadata
from perta_fast.rules import RULES, Estimator, Rule

Importances = Mapping[str, Importance] | ImportanceRatio  # of forget and retain; empty for rule tv


def importances_in(directory: Path) -> Importances:
    """Both importances below a directory, or the ratio in it. Raises InputError if there are none."""
    paths = located(directory)
    if "ratio" in paths:
        return ImportanceRatio.load(paths["ratio"])
    return {role.removesuffix("_importance"): Importance.load(path) for role, path in paths.items()}


def metadata_of(importances: Importances) -> dict[str, ImportanceMetadata]:
    """Where they come from, by ``forget`` and ``retain``."""
    if isinstance(importances, ImportanceRatio):
        return dict(importances.metadata)
    return {role: importance.metadata for role, importance in importances.items()}


def rule_of(estimator: Estimator) -> Rule:
    """A rule that needs importances of ``estimator``, at lam 0."""
    return next(rule for name in RULES if (rule := Rule.of(name, 0.0)).estimator == estimator)
