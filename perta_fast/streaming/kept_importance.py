"""The importances of a streamed run, if they are to be kept: written beside the subtraction, part by part."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError
from perta_fast.files.durable import sync_tree
from perta_fast.files.new_directory import OutputDirectory, is_kept_by, partial_path, remove_replaced
from perta_fast.importance.kept_form import KeptForm
from perta_fast.importance.row_digests import RowDigests
from perta_fast.importance.store import ShardWriter

_WHAT = "the importances that are kept"


@dataclass
class KeptImportance:
    """A directory with one importance for each data set, or with their ratio.

    output: None if there is nothing to write: no importance is kept, or ``final`` is complete. metadata: of each
    importance, by role; rows: of each that knows them. shapes: of all stored tensors. Each rank writes its part of
    every tensor.
    """

    final: Path | None
    output: OutputDirectory | None
    metadata: Mapping[str, Mapping[str, str]]
    rows: Mapping[str, RowDigests]
    shapes: Mapping[str, tuple[int, ...]]
    ranks: Ranks
    form: KeptForm
    _writers: dict[str, ShardWriter] = field(default_factory=dict, init=False)

    @classmethod
    @contextmanager
    def opened(
        cls,
        save: str,
        form: KeptForm,
        overwrite: bool,
        metadata: Mapping[str, Mapping[str, str]],
        rows: Mapping[str, RowDigests],
        shapes: Mapping[str, tuple[int, ...]],
        resumed: bool,
        ranks: Ranks,
        run: Path,
    ) -> Iterator["KeptImportance"]:
        """The first rank makes the directory; it gets the name ``save`` in ``commit``.

        save: "" to keep nothing. resumed: go on with what an earlier attempt wrote. run: its destination when it began.
        After an error, what was written stays if ``keep_on_error`` was called.
        """
        final = Path(save) if save else None
        with ExitStack() as stack:
            output = None
            with ranks.together(_WHAT):
                committed = final is not None and resumed and final.is_dir() and not partial_path(final).exists()
                if final is not None and resumed:
                    _check_kept(final if committed else partial_path(final), run)
                if final is not None and committed:
                    remove_replaced(final)
                elif final is not None:
                    output = OutputDirectory(final, overwrite=overwrite, resume=resumed, run=run)
                    if ranks.first:
                        stack.enter_context(output)
            yield cls(final, output, metadata, rows, shapes, ranks, form)

    def keep_on_error(self) -> None:
        """From now on the run can be resumed."""
        if self.output is not None:
            self.output.keep = True

    def write(self, stored: Mapping[str, Mapping[str, Tensor]], one_by_one: Mapping[str, str]) -> None:
        """Write this rank's part of what ``form.stored`` gives of complete means, durably."""
        if self.output is None:
            return
        for kind, tensors in stored.items():
            if kind not in self._writers:
                metadata = {role: {**table, "one_by_one": one_by_one[role]} for role, table in self.metadata.items()}
                rows = self.rows.get(kind)
                self._writers[kind] = self.form.writer(kind, self.shapes, metadata, self.output.path, rows)
            for name, tensor in tensors.items():
                self._writers[kind].write_share(name, tensor, self.ranks)
        sync_tree(self.output.path)

    def commit(self) -> dict[str, Checkpoint]:
        """Rename the directory; return its checkpoints by their names as inputs of a run."""
        if self.final is None:
            return {}
        with self.ranks.together(_WHAT):
            if self.output is not None and self.ranks.first:
                self.output.commit()
        return self.form.opened(self.final)


def _check_kept(directory: Path, run: Path) -> None:
    """Raise InputError unless ``directory`` is the one that the run to ``run`` has begun, and nothing else."""
    if not is_kept_by(directory, run):
        raise InputError(
            f"{directory}: does not hold the importances that the run has written; start it over with ‹overwrite›"
        )
