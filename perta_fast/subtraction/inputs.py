"""The opened inputs of an application, and which tensor meets which."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from perta_fast.checkpoints.adapters import Adapter, is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.errors import InputError
from perta_fast.importance.store import STEM, read_metadata
from perta_fast.rules import Rule
from perta_fast.subtraction.matching import TensorMatch, match_tensors


@dataclass(frozen=True)
class Sources:
    """The opened inputs of an application, and which tensor meets which."""

    model: Checkpoint
    base: Checkpoint
    tuned: Checkpoint
    forget_importance: Checkpoint | None
    retain_importance: Checkpoint | None
    matches: list[TensorMatch]
    metadata: dict[str, dict[str, str]]
    adapter_config: Path | None = None  # where ``tuned`` is the file of an adapter

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

    @property
    def base_is_read(self) -> bool:
        """Whether a task vector is a difference to the base; those of an adapter's factors are not."""
        return any(match.base is not None for match in self.matches)

    def paths(self) -> list[Path]:
        """Every directory and file that is read."""
        return [path for each in self.named().values() for path in (each.path, *each.files())]

    def operands(self, match: TensorMatch) -> Iterator[tuple[int, Checkpoint, TensorEntry]]:
        """The arrays of a tensor that lie in files: number among the kernel's five, checkpoint and entry."""
        pairs = (
            (self.model, match.theta),
            (self.tuned, match.tuned),
            (self.base, match.base),
            (self.forget_importance, match.forget_importance),
            (self.retain_importance, match.retain_importance),
        )
        for number, (checkpoint, entry) in enumerate(pairs):
            if checkpoint is not None and entry is not None:
                yield number, checkpoint, entry


def open_sources(
    rule: Rule,
    model: str | Path,
    base: str | Path,
    tuned: str | Path,
    forget_importance: Path | None,
    retain_importance: Path | None,
) -> Sources:
    """Open and match all inputs; raise InputError naming what is wrong with them."""
    opened = [open_plain(path) for path in (model, base)]
    adapter = Adapter.open(tuned) if is_adapter(tuned) else None
    opened.append(open_plain(tuned) if adapter is None else adapter.checkpoint)
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
    matches = match_tensors(opened[0], opened[1], adapter or opened[2], importances[0], importances[1])
    config = None if adapter is None else adapter.config
    return Sources(opened[0], opened[1], opened[2], importances[0], importances[1], matches, metadata, config)
