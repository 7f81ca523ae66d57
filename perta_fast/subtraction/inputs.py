"""The opened inputs of a run, and which of their tensors belong together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from perta_fast.arrays import FloatArray
from perta_fast.checkpoints.adapters import is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import check_companions_fetched
from perta_fast.checkpoints.quantised import open_plain
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.data.chat import Told
from perta_fast.errors import InputError
from perta_fast.importance import ratio as ratios
from perta_fast.importance.prompts import check_system_prompts
from perta_fast.importance.store import STEM, read_metadata
from perta_fast.rules import Rule
from perta_fast.subtraction.adapter_changes import OpenedAdapter
from perta_fast.subtraction.matching import TensorMatch, match_tensors
from perta_fast.subtraction.scope import EVERYTHING, Scope

IMPORTANCES = ("forget_importance", "retain_importance")
RATIO = "ratio"  # in place of both importances
ADVICE = "estimate it with: perta importance"
EITHER = "‹importance› takes the place of ‹forget_importance› and ‹retain_importance›; give it, or them"
_ROLES = ("model", "base", "tuned", *IMPORTANCES, RATIO)


@dataclass(frozen=True)
class Sources:
    """The opened inputs of a run.

    ratio: of both importances, in place of them. metadata: of the importances, by role, also if there is only their
    ratio. adapter: the opened one, if ``tuned`` is the file of an adapter.
    common_rows: whether rows of a resized vocabulary that not all inputs have are kept as the model has them.
    scope: which parameters were chosen to be changed. Neither is there again when a run is resumed.
    """

    model: Checkpoint
    base: Checkpoint
    tuned: Checkpoint
    forget_importance: Checkpoint | None = None
    retain_importance: Checkpoint | None = None
    matches: list[TensorMatch] = field(default_factory=list)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    adapter: OpenedAdapter | None = None
    common_rows: bool = False
    scope: Scope = EVERYTHING
    ratio: Checkpoint | None = None

    @classmethod
    def open(
        cls,
        model: str | Path,
        base: str | Path,
        tuned: str | Path,
        importances: Mapping[str, Checkpoint] = MappingProxyType({}),
        common_rows: bool = False,
        scope: Scope = EVERYTHING,
    ) -> "Sources":
        """Open and match three checkpoints and the result of ``open_importances``; InputError if they do not fit."""
        theta, theta_0 = open_plain(model), open_plain(base)
        check_companions_fetched(theta.path)
        adapter = OpenedAdapter.open(tuned, theta_0, common_rows, theta.tensors) if is_adapter(tuned) else None
        theta_f = open_plain(tuned) if adapter is None else adapter.adapter.checkpoint
        forget, retain, ratio = map(importances.get, (*IMPORTANCES, RATIO))
        return cls(
            theta,
            theta_0,
            theta_f,
            forget,
            retain,
            matches=match_tensors(theta, theta_0, adapter or theta_f, forget, retain, common_rows, scope, ratio),
            metadata=metadata_of(importances),
            adapter=adapter,
            common_rows=common_rows,
            scope=scope,
            ratio=ratio,
        )

    @property
    def left(self) -> list[str]:
        """The tensors of the model that stay as they are because ``scope`` leaves them out."""
        return [match.theta.name for match in self.matches if match.copied == "left alone by choice"]

    def named(self) -> dict[str, Checkpoint]:
        """The inputs by their names in the report."""
        inputs = {role: getattr(self, role) for role in _ROLES}
        return {role: checkpoint for role, checkpoint in inputs.items() if checkpoint is not None}

    def made(self, match: TensorMatch) -> tuple[FloatArray, ...]:
        """The float32 arrays of a match that no file holds as such: both factors, or what peft makes; or none."""
        if match.low_rank is not None:
            return match.low_rank.factors()
        if match.merged is not None and self.adapter is not None:
            return (self.adapter.array(match.merged),)
        return ()

    @property
    def adapter_config(self) -> Path | None:
        """The file with the settings of the adapter."""
        return None if self.adapter is None else self.adapter.adapter.config

    @property
    def base_is_read(self) -> bool:
        """Whether any task vector is a difference from the base; those of low rank are not."""
        return any(match.base is not None for match in self.matches)

    def paths(self) -> list[Path]:
        """Every directory and file that is read."""
        return [path for opened in self.named().values() for path in (opened.path, *opened.files())]

    def sizes(self) -> dict[Path, int]:
        """Bytes of every shard that is read."""
        shards = [shard for opened in self.named().values() for shard in opened.shards.values()]
        return {shard.path: shard.size for shard in shards}

    def operands(self, match: TensorMatch) -> Iterator[tuple[int, Checkpoint, TensorEntry]]:
        """The arrays of a tensor that lie in files: number among the kernel's five operands, checkpoint, entry.

        A ratio has the number of the retain importance, and then none has that of the forget importance.
        """
        for role, number in _OPERANDS.items():
            entry = match.theta if role == "model" else getattr(match, role)
            if entry is not None and (checkpoint := getattr(self, role)) is not None:
                yield number, checkpoint, entry


# Numbers among the kernel's operands, by role.
_OPERANDS = {"model": 0, "tuned": 1, "base": 2, "forget_importance": 3, "retain_importance": 4, RATIO: 4}


def open_importances(
    rule: Rule,
    forget: Path | None = None,
    retain: Path | None = None,
    both: Path | None = None,
    *,
    advice: str = ADVICE,
) -> dict[str, Checkpoint]:
    """The importances that ``rule`` needs, or their ratio, by role.

    both: a directory that holds the two, or their ratio, in place of the others. advice: where to get one that is
    missing. Raises InputError if they are not what the rule needs, or had different system prompts.
    """
    required = rule.required(_directories(forget, retain, both), advice)
    opened = {role: _open(role, path) for role, path in required.items()}
    metadata = metadata_of(opened)
    for role, table in metadata.items():
        rule.check_estimator(table["estimator"], opened[role if role in opened else RATIO].path)
    if metadata:
        check_system_prompts(*(Told.read(metadata[role]) for role in IMPORTANCES))
    return opened


def estimators_of(forget: Path | None, retain: Path | None, both: Path | None) -> set[str]:
    """Of the importances in these directories. Raises InputError if one of them holds none."""
    directories = _directories(forget, retain, both)
    opened = {role: _open(role, path) for role, path in directories.items() if path is not None}
    return {table["estimator"] for table in metadata_of(opened).values()}


def _open(role: str, directory: Path) -> Checkpoint:
    if role != RATIO:
        ratios.refuse_ratio(directory)
    return Checkpoint.open(directory, stem_of(role))


def _directories(forget: Path | None, retain: Path | None, both: Path | None) -> Mapping[str, Path | None]:
    if both is None:
        return dict(zip(IMPORTANCES, (forget, retain), strict=True))
    if forget is not None or retain is not None:
        raise InputError(EITHER)
    return ratios.located(both)


def stem_of(role: str) -> str:
    """How the weight files of an input are named, but for an adapter's."""
    return ratios.STEM if role == RATIO else STEM if role in IMPORTANCES else "model"


def metadata_of(importances: Mapping[str, Checkpoint]) -> dict[str, dict[str, str]]:
    """The metadata of both importances, by role, also if there is only their ratio."""
    if RATIO in importances:
        return {f"{side}_importance": table for side, table in ratios.read_ratio_metadata(importances[RATIO]).items()}
    return {role: read_metadata(importance) for role, importance in importances.items()}
