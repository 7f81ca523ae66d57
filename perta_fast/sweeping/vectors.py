"""The θ_f that rule ``preconditioned`` subtracts, one for each mu of a sweep: made in one pass, kept until its end."""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch

from perta_fast.files.new_directory import OutputDirectory, check_space
from perta_fast.preconditioning.record import Preconditioning
from perta_fast.rules import PRECONDITIONED
from perta_fast.runs.making_tuned import Making
from perta_fast.runs.precondition import check_scope, vector_size
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.scope import EVERYTHING, Scope
from perta_fast.sweeping.opened import OpenedSweep, open_sources
from perta_fast.sweeping.request import Request


class Vectors:
    """They lie in ``folder``, each by the name of its mu; one that is there is complete."""

    def __init__(self, folder: Path, mus: Iterable[float]) -> None:
        self._folder, self._mus = folder, tuple(mus)

    def lacking(self) -> list[float]:
        """Those that are not there yet."""
        return [mu for mu in self._mus if not self.of(mu).exists()]

    def of(self, mu: float) -> Path:
        """The directory of one."""
        return self._folder / f"mu-{mu!r}"

    def record(self, mu: float) -> Preconditioning:
        """What was written down of one."""
        return Preconditioning.read(self.of(mu))

    def sources(self, request: Request, mu: float) -> Sources:
        """The checkpoints of the sweep with one in the place of its θ_f."""
        return open_sources(request, tuned=self.of(mu))

    def check_space(self, request: Request) -> None:
        """Raise RunError unless the disk holds those that are lacking."""
        if lacking := self.lacking():
            check_space(self._folder, len(lacking) * vector_size(Path(request.base), Path(request.tuned)))

    def make(self, opened: OpenedSweep) -> None:
        """Write those that are lacking. A model is loaded for it, and is free afterwards."""
        lacking = self.lacking()
        if not lacking:
            return
        request, data = opened.request, opened.data["retain"]
        making = Making(
            base=Path(request.base),
            tuned=Path(request.tuned),
            seen_at=Path(request.model if opened.place(PRECONDITIONED) == "model" else request.base),
            retain=request.retain,
            batch_size=request.batch_size,
            max_length=request.max_length,
            chat=opened.chat,
            device=request.device,
            dtype=None if request.dtype is None else getattr(torch, request.dtype),
            progress=opened.progress,
        )
        with ExitStack() as entered:
            targets = {mu: entered.enter_context(OutputDirectory(self.of(mu), overwrite=True)) for mu in lacking}
            making.run(data.rows, data.digest, {mu: target.path for mu, target in targets.items()})
            if Scope.of(request.only, request.leave) != EVERYTHING:
                check_scope(open_sources(request, tuned=targets[lacking[0]].path))
            for target in targets.values():
                target.commit()
