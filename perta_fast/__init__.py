"""Per-parameter task arithmetic (PerTA, arXiv 2601.22030) for checkpoints of any size.

    theta_out = theta_full - lam * w * (theta_f - theta_0),   w = I_f^p / (I_f^p + alpha * I_r^p)

Names are imported at first use: what does not need torch does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perta_fast import ops
    from perta_fast.data.samples import Sample
    from perta_fast.errors import InputError, Interrupted, PertaError, RunError
    from perta_fast.evaluation.results import Evaluation
    from perta_fast.importance.ratio import ImportanceRatio
    from perta_fast.importance.store import Importance
    from perta_fast.preconditioning.record import Preconditioning
    from perta_fast.progress import Event
    from perta_fast.records.report import Report
    from perta_fast.reporting.run import write_report
    from perta_fast.resuming import resume
    from perta_fast.runs.apply import apply
    from perta_fast.runs.combine_importances import merge_importances, remove_importances
    from perta_fast.runs.estimate_importance import estimate_importance
    from perta_fast.runs.evaluate import evaluate
    from perta_fast.runs.merge import merge
    from perta_fast.runs.precondition import precondition
    from perta_fast.runs.unlearn import unlearn
    from perta_fast.runs.verify import verify
    from perta_fast.subtraction.on_module import apply_to_module_
    from perta_fast.sweeping.choose import choose
    from perta_fast.sweeping.results import Sweep
    from perta_fast.sweeping.run import sweep
    from perta_fast.tuning.run import Tuning, tune

_HOMES = {
    "Evaluation": "perta_fast.evaluation.results",
    "Event": "perta_fast.progress",
    "Importance": "perta_fast.importance.store",
    "ImportanceRatio": "perta_fast.importance.ratio",
    "InputError": "perta_fast.errors",
    "Interrupted": "perta_fast.errors",
    "PertaError": "perta_fast.errors",
    "Preconditioning": "perta_fast.preconditioning.record",
    "Report": "perta_fast.records.report",
    "RunError": "perta_fast.errors",
    "Sample": "perta_fast.data.samples",
    "Sweep": "perta_fast.sweeping.results",
    "Tuning": "perta_fast.tuning.run",
    "apply": "perta_fast.runs.apply",
    "apply_to_module_": "perta_fast.subtraction.on_module",
    "choose": "perta_fast.sweeping.choose",
    "estimate_importance": "perta_fast.runs.estimate_importance",
    "evaluate": "perta_fast.runs.evaluate",
    "merge": "perta_fast.runs.merge",
    "merge_importances": "perta_fast.runs.combine_importances",
    "precondition": "perta_fast.runs.precondition",
    "remove_importances": "perta_fast.runs.combine_importances",
    "resume": "perta_fast.resuming",
    "sweep": "perta_fast.sweeping.run",
    "tune": "perta_fast.tuning.run",
    "unlearn": "perta_fast.runs.unlearn",
    "verify": "perta_fast.runs.verify",
    "write_report": "perta_fast.reporting.run",
}

__all__ = [
    "Evaluation",
    "Event",
    "Importance",
    "ImportanceRatio",
    "InputError",
    "Interrupted",
    "PertaError",
    "Preconditioning",
    "Report",
    "RunError",
    "Sample",
    "Sweep",
    "Tuning",
    "apply",
    "apply_to_module_",
    "choose",
    "estimate_importance",
    "evaluate",
    "merge",
    "merge_importances",
    "ops",
    "precondition",
    "remove_importances",
    "resume",
    "sweep",
    "tune",
    "unlearn",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("perta_fast.ops")
    if name == "__version__":
        from importlib import metadata

        return metadata.version("perta-fast")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'perta_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
