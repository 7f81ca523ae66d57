"""What an unfinished sweep has scored, kept on disk so that it can be resumed."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from perta_fast.arguments import check_sizes
from perta_fast.checkpoints.fingerprint import Fingerprint, check_inputs
from perta_fast.data.chat import parse_date
from perta_fast.data.given import same_call
from perta_fast.dtypes import FLOATING
from perta_fast.errors import InputError, RunError, shell_command
from perta_fast.files.durable import read_record, write_record
from perta_fast.files.new_directory import (
    START_OVER,
    SWEEP_RECORD,
    SWEEP_STATE,
    OutputDirectory,
    has_record,
    partial_path,
    unfinished_advice,
)
from perta_fast.files.reading import exists
from perta_fast.records.typed_json import typed
from perta_fast.records.versions import this_version
from perta_fast.scoring.base_loss import ForgetLimit
from perta_fast.scoring.setting import Limits, ScoredSetting
from perta_fast.streaming.schedule import Schedule
from perta_fast.sweeping.grid import Curve
from perta_fast.sweeping.request import Request

STATE = SWEEP_STATE  # holds the record, and importances estimated for the sweep
_WALKS = "walks"
_FORMAT = "perta-sweep"
_FORMAT_VERSION = 5


@dataclass(frozen=True)
class WalkPlan:
    """How a streamed sweep walks: decided once, and kept, since a walk goes on only as it began.

    batch_size, overlap, groups: as in a ``Schedule``. most: versions of the weights in one walk, for whose hidden
    states the disk has room. twice: whether a first walk finds strengths that need not be scored.
    """

    batch_size: int
    overlap: bool
    most: int
    twice: bool = False
    groups: int = 1

    @property
    def schedule(self) -> Schedule:
        """How each walk is cut."""
        return Schedule(self.batch_size, groups=self.groups, overlap=self.overlap)


@dataclass
class Begun:
    """An unfinished sweep.

    inputs: the states of what it reads. day: when it began, for chat templates that ask for the date, as 2025-04-10.
    rows: the scored settings. gold: the gold model's scores, once they are known. plans: of a streamed sweep's walks,
    by name, once they are made. applying: whether the model may be changed already, in place. processes: that do it
    together. kept: the files of what is kept, by what it is: written down just before they get their place
    (``keeping``). types: in which models run, by their paths. base: the forget loss of theta_0, in nats, once it is
    known.
    """

    request: Request
    inputs: dict[str, Any]
    started: str
    day: str
    rows: list[ScoredSetting]
    gold: ScoredSetting | None = None
    plans: dict[str, WalkPlan] = field(default_factory=dict)
    applying: bool = False
    processes: int = 1
    kept: dict[str, dict[str, Fingerprint]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    base: float | None = None

    def _check(self) -> None:
        """Raise InputError for what no sweep is begun with: whoever wrote the record, it is not believed."""
        self.request.check_paths()
        parse_date(self.day)
        for name in self.types.values():
            if name not in FLOATING:
                raise InputError(f"a model runs in {name!r}")
        for plan in self.plans.values():
            check_sizes(plan.batch_size, None, most=plan.most, groups=plan.groups, processes=self.processes)
        if self.base is not None and not math.isfinite(self.base):
            raise InputError(f"the loss of base is {self.base}")

    @property
    def is_scored(self) -> bool:
        """Whether any setting is."""
        return any(row.rule for row in self.rows)

    @property
    def original(self) -> ScoredSetting | None:
        """What the model as it is has scored."""
        return next((row for row in self.rows if not row.rule), None)

    def forget_limit(self, original: ScoredSetting) -> ForgetLimit:
        """The largest forget loss, if base sets one. original: the model as it is."""
        return ForgetLimit.of(self.base, original.forget_loss)

    def limits(self, original: ScoredSetting) -> Limits:
        """What settings have to keep, as in ``Request.limits``."""
        return self.request.limits(original, self.forget_limit(original).loss)

    def going_on(self, final: Path) -> str:
        """The command that goes on with the sweep to ``final``, by as many processes as began it."""
        if self.request.is_of_given_rows:
            return same_call(self.request.overwrite)
        if self.request.in_place:
            return "the same command" + ", without ‹overwrite›" * self.request.overwrite
        several = ["torchrun", "--nproc-per-node", str(self.processes), "-m", "perta_fast"]
        return shell_command(*(["perta"] if self.processes == 1 else several), "resume", final)

    def is_asked_for(self, request: Request) -> bool:
        """Whether ``request`` is for this sweep. What it may replace it was told when it began."""
        return replace(self.request, overwrite=request.overwrite) == request

    def check_request(self, request: Request, final: Path) -> None:
        """Raise InputError, with what finishes this sweep to ``final``, if another one is asked for."""
        if self.is_asked_for(request):
            return
        if self.request.in_place:
            raise InputError(
                f"{final}: another sweep to this place was stopped; finish it with the command that began it, which is "
                f"to change {self.request.model} in place, or start over with ‹overwrite›"
            )
        raise InputError(unfinished_advice(final))

    def check_processes(self, count: int, final: Path) -> None:
        """Raise InputError unless as many processes began this sweep to ``final``."""
        if self.processes != count:
            raise InputError(
                f"{final}: the sweep was begun by {self.processes} processes, this is a run of {count}; finish it "
                f"with: {self.going_on(final)}"
            )

    def check_record(self, target: OutputDirectory) -> None:
        """Raise RunError unless ``target``, which is locked, still has the record that this was loaded from."""
        there = has_record(target.final, STATE)
        if there and repr(load_begun(target.final)) == repr(self):  # a score that is not a number equals no other
            return
        target.keep = there
        raise RunError(f"{target.final}: another run has gone on with this sweep meanwhile; see what is there now")

    def find(self, curve: Curve, lam: float) -> ScoredSetting | None:
        """What a setting has scored."""
        return next((row for row in self.rows if curve.has(row) and row.lam == lam), None)


def load_begun(final: Path) -> Begun:
    """The unfinished sweep to ``final``. Raises InputError if its record is damaged or of another version."""
    path = partial_path(final) / STATE / SWEEP_RECORD
    content = read_record(path, START_OVER)
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise InputError(f"{path}: is not the record of a sweep; start over with ‹overwrite›")
    version = content.pop("version", None)
    if version != this_version():
        raise InputError(
            f"{path}: the sweep was begun by perta_fast {version}, this is {this_version()}; "
            "install that version to finish it, or start over with ‹overwrite›"
        )
    try:
        if content.pop("format_version", None) != _FORMAT_VERSION:
            raise InputError("format_version")
        begun: Begun = typed(content, Begun)
        begun._check()
    except InputError as error:
        raise InputError(
            f"{path}: the sweep was begun by another build of perta_fast, or its record is damaged ({error}); "
            "start over with ‹overwrite›"
        ) from error
    return begun


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError, naming it, if an input has changed since the sweep began.

    A directory that is gone can only be one where an importance was taken: nothing more is read there.
    """
    compared = {path: state for path, state in before.items() if path in now or exists(Path(path).parent)}
    check_inputs(compared, now, "sweep")


@dataclass(frozen=True)
class Record:
    """What has been scored; kept in ``target``, if there is one. writes: whether this process writes it down."""

    begun: Begun
    target: OutputDirectory | None
    writes: bool = True

    @property
    def importances(self) -> Path | None:
        """Where importances estimated for the sweep are kept."""
        return None if self.target is None else self.target.path / STATE / "importance"

    @property
    def folder(self) -> Path:
        """Where the result of the sweep is built."""
        assert self.target is not None
        return self.target.path

    def walk(self, name: str, *, alone: bool = False) -> Path:
        """Where what a walk goes on from is kept. alone: one that scores no setting."""
        return self.folder / STATE / ("alone" if alone else _WALKS) / name

    @property
    def has_work(self) -> bool:
        """Whether a setting is scored, an importance or a θ_f is there, or a walk has begun."""
        if self.begun.is_scored or self.begun.kept:
            return True
        state = None if self.target is None else self.target.path / STATE
        return state is not None and any(any(state.glob(work)) for work in ("importance/*/*", "tuned/*", f"{_WALKS}/*"))

    def keep(self) -> None:
        """From now on there is work that a stopped sweep goes on with."""
        if self.target is not None:
            self.target.keep = True

    def give_up(self) -> None:
        """Nothing is there to go on with."""
        if self.target is not None:
            self.target.keep = False

    def note_kept(self, what: str, files: dict[str, Fingerprint]) -> None:
        """Something is complete, and gets its name next."""
        self.begun.kept[what] = files
        self.save()

    def add(self, *settings: ScoredSetting) -> ScoredSetting:
        """Keep more settings; returns the first."""
        self.begun.rows += settings
        self.save()
        return settings[0]

    def save(self) -> None:
        """Write the record, durably; after a crash there is the old one or the new one."""
        if self.target is None or not self.writes:
            return
        folder = self.target.path / STATE
        folder.mkdir(exist_ok=True)
        about = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "version": this_version()}
        write_record(folder / SWEEP_RECORD, about | asdict(self.begun))
        if self.begun.rows or self.begun.gold is not None or self.begun.base is not None:
            self.keep()
