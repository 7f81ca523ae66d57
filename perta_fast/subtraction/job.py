"""A run's own description, kept on disk while it lasts: enough to finish it after a crash, bit for bit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.adapter_kinds import STEM as ADAPTER_STEM
from perta_fast.checkpoints.adapters import Adapter, is_adapter
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import CARD, CONFIG
from perta_fast.checkpoints.fingerprint import PUT_BACK, Fingerprint, fingerprint
from perta_fast.checkpoints.low_rank import LowRank
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.dtypes import ITEM_SIZES
from perta_fast.errors import InputError, shell_command
from perta_fast.files.durable import read_record, write_record
from perta_fast.files.hashing import NONE_IN_PASSING, HashesInPassing, hash_file
from perta_fast.files.identity import is_same
from perta_fast.progress import Progress
from perta_fast.records.report import DirectoryRecord, Report
from perta_fast.records.typed_json import typed
from perta_fast.records.versions import this_version
from perta_fast.rules import Rule
from perta_fast.subtraction.adapter_changes import OpenedAdapter
from perta_fast.subtraction.compute import Subtraction
from perta_fast.subtraction.inputs import Sources, stem_of
from perta_fast.subtraction.matching import TensorMatch
from perta_fast.subtraction.read_beside import NONE, Records, check_unchanged, companion_records

FORMAT = "perta-run"
FORMAT_VERSION = 1

Piece = list[str | int]  # name, and the bytes of its shard from where to where
MatchNames = dict[str, str | float | bool | list[Piece] | None]


@dataclass
class Job:
    """What a run does. Paths are absolute.

    final: the directory to make, or to change in place. files: the ``fingerprints`` of the inputs. matches: the
    ``match_names`` when the run began. temporary: the importances lie at ``scratch_path(final)`` and are removed
    when the run is done. stream: the ``StreamSettings`` of a streamed run. report: as it was when the run began.
    companions: the ``companion_records`` of the inputs.
    """

    final: str
    in_place: bool
    overwrite: bool
    rule: Rule
    threads: int
    chunk: int
    drop_cache: bool
    link_unchanged: bool
    directories: dict[str, str]
    files: dict[str, dict[str, Fingerprint]]
    matches: list[MatchNames]
    version: str
    temporary: bool = False
    stream: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    companions: Records = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.progress: Progress = True  # not a field, so not in the record

    def same_work(self, other: "Job") -> bool:
        """Whether another job makes the same output from the same inputs."""
        keys = ("final", "in_place", "rule", "files", "companions", "matches", "version")
        # Schedule and number of ranks change only the order of sums; what it may replace it was told when it began.
        other_keys = {"schedule", "ranks", "overwrite_saved"}
        walks = [{key: job.stream[key] for key in job.stream.keys() - other_keys} for job in (self, other)]
        return walks[0] == walks[1] and all(getattr(self, key) == getattr(other, key) for key in keys)

    @property
    def resume_command(self) -> str:
        """The command that finishes the run; a walk by many processes needs as many again."""
        ranks = self.stream.get("ranks", 1)
        perta = ["perta"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks), "-m", "perta_fast"]
        return shell_command(*perta, "resume", Path(self.final))

    def changes(self, role: str) -> bool:
        """Whether an input is the model that the run changes; the base may be the same directory."""
        return self.in_place and is_same(self.directories[role], self.directories["model"])

    def count_resume(self) -> None:
        """Count in the report that the run was resumed."""
        self.report["resumed"] += 1

    def subtraction(self, sources: Sources, hashes: HashesInPassing = NONE_IN_PASSING) -> Subtraction:
        """The arithmetic of this run on its opened inputs."""
        settings = (self.rule.rescaling, self.threads, self.chunk, self.drop_cache)
        return Subtraction(sources, *settings, hashes=hashes, merging=self.report.get("merged", False))

    def begun_report(self) -> Report:
        """``report`` as a Report."""
        report: Report = typed(self.report, Report)
        return report

    def save(self, path: Path) -> None:
        """Write the job durably."""
        write_record(path, {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "Job":
        """Read a job. Raises InputError if it is damaged or of another version of the package."""
        content = read_record(path)
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise InputError(f"{path}: is not the description of a run")
        version = content.get("version")
        if content.pop("format_version", None) != FORMAT_VERSION or version != this_version():
            raise InputError(
                f"{path}: the run was begun by perta_fast {version}, this is {this_version()}; "
                "install that version to finish it"
            )
        try:
            job: Job = typed(content, cls)
            typed(job.report, Report)
        except InputError as error:
            raise InputError(f"{path}: is not a description that this version understands: {error}") from error
        return job


def fingerprints(sources: Sources) -> dict[str, dict[str, Fingerprint]]:
    """Size, time of change and hash of the header of every weight file, by role and name; and an adapter's config."""
    files = {role: fingerprint(checkpoint) for role, checkpoint in sources.named().items()}
    config = sources.adapter_config
    if config is not None:
        status = config.stat()
        state = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "header": hash_file(config)}
        files["tuned"][config.name] = state
    return files


_OPERANDS = ("base", "tuned", "forget_importance", "retain_importance", "ratio")


def match_names(matches: list[TensorMatch]) -> list[MatchNames]:
    """The matches with tensors by name."""
    rows = []
    for match in matches:
        row: MatchNames = {"theta": match.theta.name, "copied": match.copied}
        for role in _OPERANDS:
            entry: TensorEntry | None = getattr(match, role)
            row[role] = None if entry is None else entry.name
            if entry is not None and entry.pieces:
                row[role] = [[piece.name, piece.begin, piece.end] for piece in entry.pieces]
        if match.low_rank is not None:
            update = match.low_rank
            row |= {"a": update.a.name, "b": update.b.name, "scale": update.scale, "transposed": update.transposed}
        if match.merged is not None:
            row["merged"] = match.merged
        rows.append(row)
    return rows


def reopen(job: Job, set_aside: Mapping[str, Path] = NONE, new_card: str = "") -> Sources:
    """Open a job's inputs again; raise InputError if one of them has changed since the run began.

    set_aside: where files of the model lie, by name, that a run in place has moved. new_card: the hash of the model
    card that it has written. That model's times of change are not compared, since the run itself has changed them.
    """
    index = next((path for name, path in set_aside.items() if name != CONFIG), None)
    opened: dict[str, Checkpoint] = {}
    adapted = is_adapter(job.directories["tuned"])
    for role, path in job.directories.items():
        stem = stem_of(role)
        if role == "tuned" and adapted:
            stem = ADAPTER_STEM
        changing = job.changes(role)
        opened[role] = Checkpoint.open(path, stem, index=index if changing else None, unfinished=changing)
    adapter = OpenedAdapter(Adapter.open(job.directories["tuned"], opened["base"].path)) if adapted else None
    sources = Sources(**opened, adapter=adapter)  # type: ignore[arg-type]
    _check_files(job, fingerprints(sources))
    sources = replace(sources, matches=[_match(row, opened, job) for row in job.matches])
    if any(match.merged is not None for match in sources.matches):
        names = sources.model.tensors
        # Whether rows may differ was checked at the start.
        merging = OpenedAdapter.open(job.directories["tuned"], sources.base, common_rows=True, names=names)
        matches = [
            match if match.merged is None else replace(match, merged_count=merging.count(match.merged))
            for match in sources.matches
        ]
        sources = replace(sources, adapter=merging, matches=matches)
    if job.companions:
        report = job.begun_report()
        before, now = dict(job.companions), companion_records(sources, report, set_aside)
        if job.changes("base"):  # its files are the model's
            before.pop("base", None)
        card = now["model"].get(CARD)
        if card is not None and card["blake3"] == new_card:
            before["model"] = {**before.get("model", {}), CARD: card}
        check_unchanged(before, now, job.directories, report)
    return sources


def _check_files(job: Job, files: Mapping[str, Mapping[str, Fingerprint]]) -> None:
    """Raise InputError, with what to do, unless the ``fingerprints`` are those that the run began with.

    A run in place has hashed its inputs before it changed anything: a file with its content may have another time.
    """
    advice = "put the old file back to finish the run"
    if not job.in_place:
        advice = f"{PUT_BACK} to finish the run, or start over with ‹overwrite›"
    for role, current in files.items():
        before = job.files.get(role, {})
        for name, state in current.items():
            known, path = before.get(name), Path(job.directories[role]) / name
            if known is not None and (job.changes(role) or _is_put_back(job, role, path, known, state)):
                known = {**known, "mtime_ns": state["mtime_ns"]}
            if state != known:
                raise InputError(f"{path}: has changed since the run began; {advice}")
        if before.keys() != current.keys():
            raise InputError(f"{job.directories[role]}: its shards are not those that the run began with")
    job.files = {role: dict(current) for role, current in files.items()}


def _is_put_back(job: Job, role: str, path: Path, known: Fingerprint, state: Fingerprint) -> bool:
    """Whether a file of another time of change has the content that the run has hashed."""
    if known["mtime_ns"] == state["mtime_ns"] or known["bytes"] != state["bytes"]:
        return False
    record = job.begun_report().inputs.get(role, DirectoryRecord(path="", files={}))["files"].get(path.name)
    return record is not None and hash_file(path) == record["blake3"]


def _piece(tensors: Mapping[str, TensorEntry], name: Any, begin: Any, end: Any) -> TensorEntry:
    """A range of a stored tensor. Raises KeyError, TypeError or ValueError if there is none."""
    whole, width = tensors[name], ITEM_SIZES[tensors[name].dtype]
    if not whole.begin <= begin < end <= whole.end or (begin - whole.begin) % width or (end - begin) % width:
        raise ValueError(f"{name} has no bytes {begin} to {end}")
    return replace(whole, shape=((end - begin) // width,), begin=begin, end=end)


def _match(row: MatchNames, opened: Mapping[str, Checkpoint], job: Job) -> TensorMatch:
    entries: dict[str, TensorEntry | None] = {}
    try:
        theta = opened["model"].tensors[str(row["theta"])]
        for role in _OPERANDS:
            name, tensors = row[role], opened[role].tensors if role in opened else {}
            if isinstance(name, list):
                entries[role] = TensorEntry.made_of([_piece(tensors, *piece) for piece in name], theta.shape)
            else:
                entries[role] = None if name is None else tensors[str(name)]
        low_rank = None
        if "scale" in row:
            a, b = (opened["tuned"].tensors[str(row[factor])] for factor in ("a", "b"))
            low_rank = LowRank(a, b, float(str(row["scale"])), row["transposed"] is True)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{job.final}: the run's description is damaged: {error}") from error
    return TensorMatch(theta, **entries, copied=row["copied"], low_rank=low_rank, merged=row.get("merged"))  # type: ignore[arg-type]
