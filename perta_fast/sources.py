"""The opened inputs of an application, and which tensor meets which."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from perta_fast.agreement import TensorPlan, plan_tensors
from perta_fast.checkpoint import Checkpoint
from perta_fast.errors import InputError
from perta_fast.importance.store import STEM, read_metadata
from perta_fast.rules import Rule
from perta_fast.safetensors_file import TensorEntry


@dataclass(frozen=True)
class Sources:
    """The opened inputs of an application, and which tensor meets which."""

    model: Checkpoint
    base: Checkpoint
    tuned: Checkpoint
    forget_importance: Checkpoint | None
    retain_importance: Checkpoint | None
    plans: list[TensorPlan]
    metadata: dict[str, dict[str, str]]

    def named(self) -> dict[str, Checkpoint]:
        """The inputs by the names they have in the report."""
        everything = {
            "model": self.model,
            "base": self.base,
            "tuned": self.tuned,
            "forget_importance": self.forget_importance,
            "retain_importance": self.retain_importance,
        }
        return {name: checkpoint for name, checkpoint in everything.items() if checkpoint is not None}

    def paths(self) -> list[Path]:
        """Every directory and file that is read."""
        return [path for each in self.named().values() for path in (each.path, *each.files())]

    def operands(self, plan: TensorPlan) -> Iterator[tuple[Checkpoint, TensorEntry]]:
        """Checkpoint and place of each array of a tensor, in the kernel's order."""
        pairs = (
            (self.model, plan.theta),
            (self.tuned, plan.tuned),
            (self.base, plan.base),
            (self.forget_importance, plan.forget_importance),
            (self.retain_importance, plan.retain_importance),
        )
        for checkpoint, entry in pairs:
            if checkpoint is not None and entry is not None:
                yield checkpoint, entry


def open_sources(
    rule: Rule,
    model: str | Path,
    base: str | Path,
    tuned: str | Path,
    forget_importance: Path | None,
    retain_importance: Path | None,
) -> Sources:
    """Open and match all inputs; raise InputError naming what is wrong with them."""
    opened = [Checkpoint.open(path) for path in (model, base, tuned)]
    importances: list[Checkpoint | None] = [None, None]
    metadata = {}
    if rule.estimator is not None:
        for k, (role, path) in enumerate(
            {"forget_importance": forget_importance, "retain_importance": retain_importance}.items()
        ):
            if path is None:
                raise InputError(f"rule {rule.name} needs {role}; estimate it with: perta importance")
            importances[k] = checkpoint = Checkpoint.open(path, STEM)
            metadata[role] = found = read_metadata(checkpoint)
            if found["estimator"] != rule.estimator:
                raise InputError(
                    f"{path}: holds estimator {found['estimator']}, rule {rule.name} needs {rule.estimator}"
                )
    elif forget_importance is not None or retain_importance is not None:
        raise InputError("rule tv takes no importance; leave it out or choose another rule")
    plans = plan_tensors(opened[0], opened[1], opened[2], importances[0], importances[1])
    return Sources(opened[0], opened[1], opened[2], importances[0], importances[1], plans, metadata)
