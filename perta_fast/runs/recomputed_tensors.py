"""The tensors of a finished run's output, made again from its inputs by the reference."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perta_fast.arrays import FloatArray
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import InputError
from perta_fast.progress import Bar, Progress
from perta_fast.records.report import FILE_NAME, Report
from perta_fast.rules import EXACT_POWERS, Rule
from perta_fast.runs.verification import Verification
from perta_fast.subtraction.inputs import IMPORTANCES, RATIO, Sources, open_importances
from perta_fast.subtraction.matching import TensorMatch
from perta_fast.subtraction.scope import Scope

SAMPLED = 8  # tensors recomputed unless all are asked for
_CHUNK = 1 << 22  # elements compared at a time


@dataclass(frozen=True)
class RecomputedTensors:
    """The tensors of an output, beside what the inputs give by the reference.

    exact: whether the weights are known; if not, results can only be checked for bounds.
    """

    report: Report
    rule: Rule
    sources: Sources
    output: Checkpoint
    exact: bool

    @classmethod
    def opened(
        cls, directory: Path, report: Report, intact: set[str], result: Verification
    ) -> "RecomputedTensors | None":
        """Open the inputs that are ``intact``; None, with the reason in ``result``, if there is nothing to compare."""
        absent = {"model", "base", "tuned"} - intact
        if absent == {"tuned"} and report.preconditioned is not None and not report.inputs["tuned"].get("kept", True):
            result.unchecked.append("tensors, because the run did not keep the preconditioned θ_f")
            return None
        if absent:
            result.unchecked.append(f"tensors, because of {', '.join(sorted(absent))}")
            return None
        try:
            rule = report.chosen_rule()
        except InputError as error:
            raise InputError(f"{directory / FILE_NAME}: {error}") from error
        exact = rule.estimator is None or set(IMPORTANCES) <= intact or RATIO in intact
        paths = {role: Path(record["path"]) for role, record in report.inputs.items()}
        try:
            importances = open_importances(rule, *map(paths.get, (*IMPORTANCES, RATIO))) if exact else {}
            three, scope = (paths["model"], paths["base"], paths["tuned"]), Scope.of(report.only or None, report.leave)
            sources = Sources.open(*three, importances, report.common_rows, scope)
        except InputError as error:  # such as a base of which an adapter needed only the headers
            result.unchecked.append(f"tensors, because an input cannot be opened any more: {error!s}")
            return None
        if not exact:
            result.unchecked.append("weights, because the run did not keep the importances")
        if report.preconditioned is not None:
            result.unchecked.append(f"how θ_f was preconditioned; it was taken as it lies in {paths['tuned']}")
        output = Checkpoint.open(directory)
        problems = _layout_problems(report, sources, output)
        result.problems += problems
        return None if problems else cls(report, rule, sources, output, exact)

    def check(self, result: Verification, full: bool, seed: int, progress: Progress) -> None:
        """Compare all tensors, or a sample."""
        actions = {row.name: row.action for row in self.report.tensors}
        matches = self.sources.matches
        if not full and len(matches) > SAMPLED:
            matches = random.Random(seed).sample(matches, SAMPLED)
        with Bar(sum(match.theta.size for match in matches), "tensors", progress) as bar:
            for match in matches:
                # Without the importances, only the report says which tensors they did not cover.
                action = actions.get(match.theta.name, "")
                copied = match.copied is not None or (not self.exact and action.startswith("copied"))
                if not self._is_right(match, copied):
                    result.problems.append(f"tensor {match.theta.name} is not what the inputs give")
                elif self.exact or copied:
                    result.recomputed += 1
                else:
                    result.bounded += 1
                bar.update(match.theta.size)

    def _is_right(self, match: TensorMatch, copied: bool) -> bool:
        made = () if copied else self.sources.made(match)
        for begin in range(0, match.theta.count, _CHUNK):
            count = min(_CHUNK, match.theta.count - begin)
            computed = 0 if copied else max(0, min(count, match.common - begin))
            kept = (begin + computed, count - computed)
            entry = self.output.tensors[match.theta.name]
            if _bytes(self.output, entry, *kept) != _bytes(self.sources.model, match.theta, *kept):
                return False
            if computed and not self._chunk_is_right(match, made, begin, computed):
                return False
        return True

    def _chunk_is_right(self, match: TensorMatch, made: tuple[FloatArray, ...], begin: int, count: int) -> bool:
        import torch

        from perta_fast.ops import reference

        rescaling = self.rule.rescaling
        arrays: list[Any] = [None] * 5
        for operand, checkpoint, entry in self.sources.operands(match):
            arrays[operand] = checkpoint.elements(entry, begin, count)
        theta, tuned, base, forget, retain = arrays  # without forget, retain is the ratio
        if match.merged is not None:
            tuned = torch.from_numpy(made[0][begin : begin + count])
        if match.low_rank is None:
            task_vector = tuned.float() - base.float()
        else:
            task_vector = _low_rank_chunk(made, match.low_rank.scale, begin, count)
        # Without importances this is the result for w = 1: one end of the range in which the true result lies.
        expected = reference.subtract(theta, task_vector, forget, retain, rescaling)
        actual = self.output.elements(self.output.tensors[match.theta.name], begin, count)
        if self.exact and (retain is None or rescaling.p in EXACT_POWERS):
            return bool(torch.equal(expected.view(torch.uint8), actual.view(torch.uint8)))
        if self.exact:  # the last bit of another power may differ, and then that of the update and of the result
            slack = 4 * torch.finfo(torch.float32).eps * abs(rescaling.lam) * task_vector.abs()
            slack += torch.finfo(theta.dtype).eps * expected.float().abs()
            return bool(((actual.float() - expected.float()).abs() <= slack).all())
        low, high = torch.minimum(theta, expected), torch.maximum(theta, expected)
        return bool(((low <= actual) & (actual <= high)).all())


def _low_rank_chunk(factors: tuple[FloatArray, ...], scale: float, begin: int, count: int) -> Any:
    """Consecutive elements of a task vector that is given by its factors."""
    import torch

    from perta_fast.ops import reference

    left, right = map(torch.from_numpy, factors)
    columns = right.shape[1]
    first, end = begin // columns, -(-(begin + count) // columns)
    rows = reference.low_rank_task_vector(left[first:end], right, scale)
    return rows.view(-1)[begin - first * columns :][:count]


def _bytes(checkpoint: Checkpoint, entry: TensorEntry, begin: int, count: int) -> bytes:
    width = ITEM_SIZES[entry.dtype]
    start = entry.begin + begin * width
    return checkpoint.file_of(entry).content(start, start + count * width)


def _layout_problems(report: Report, sources: Sources, output: Checkpoint) -> list[str]:
    """Shards that the report does not list, or that are not laid out as the model's."""
    listed = {"output": report.output, **report.inputs}
    problems = []
    for role, checkpoint in {"output": output, **sources.named()}.items():
        if role == "base" and not sources.base_is_read:
            continue
        for name, shard in checkpoint.shards.items():
            if name not in listed[role]["files"]:
                problems.append(f"{shard.path} is not in the report")
    for name, shard in sources.model.shards.items():
        if name not in output.shards or output.shards[name].header != shard.header:
            problems.append(f"{output.path / name} is not laid out as {shard.path}")
    return problems
