"""One forward walk that scores several versions of a model's weights, or one for each group of the samples.

Each part of the model is held once: the weights of one version after another are made of it, and run over that
version's own hidden states, which lie in scratch files. A step is one version in one part.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from perta_fast.data.batches import Batch
from perta_fast.data.samples import IGNORED, by_row
from perta_fast.distributed.ranks import Ranks
from perta_fast.dtypes import torch_name
from perta_fast.errors import InputError, NotFiniteError
from perta_fast.models.scores import TokenScores
from perta_fast.models.token_scores import score_batch, seen, trims
from perta_fast.progress import Bar, Progress
from perta_fast.records.typed_json import fits
from perta_fast.streaming.forward.padded_batch import PaddedBatch, batches_of
from perta_fast.streaming.forward.part_weights import PartWeights
from perta_fast.streaming.forward.sample_set import SampleSet
from perta_fast.streaming.forward.score_columns import as_columns, from_columns
from perta_fast.streaming.forward.version import Version, VersionScores
from perta_fast.streaming.micro_batch import MicroBatch
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.scratch_files import FileRecord, ScratchFiles, StepFiles
from perta_fast.streaming.step_record import rank_path, record_step, resume_step
from perta_fast.subtraction.held_inputs import fetch

_RECORD, _SCRATCH = "scores.json", "scratch"


def score_versions(
    skeleton: Skeleton,
    versions: Sequence[Version],
    sets: Sequence[SampleSet],
    *,
    schedule: Schedule,
    threads: int,
    folder: Path,
    resumable: bool = False,
    progress: Progress = True,
    description: str = "scoring",
    ranks: Ranks = Ranks.ALONE,
) -> list[VersionScores]:
    """Run every version over every set, reading the inputs of each part of the model once for all versions.

    The numbers are those of ``score_rows`` on the loaded model, the same bits in float32 on the CPU. schedule: with
    several groups, the walk goes through the model once for each. To overlap is to have the system read the next part
    into the page cache meanwhile. folder: for hidden states and finished scores; made here, and left for the caller to
    remove. resumable: keep a record there after each step, from which a later call with the same arguments goes on.
    ranks: each runs its share of every set's batches; all get the whole result.

    Memory: the inputs of one part of the model, one changed copy of it, the activations of one batch. Raises RunError
    if a file has changed its size, OSError if the disk is full, InputError if the record is damaged or of other
    samples.
    """
    with ranks.sharing_errors(description):
        with ranks.together(description):
            weights = PartWeights(skeleton, versions, threads)
            walks = [
                _ScoreWalk(skeleton, versions, sets, schedule, group, weights, folder, ranks)
                for group in range(schedule.groups)
            ]
        begun = [walk.resume(progress) if resumable else 0 for walk in walks]
        total = sum(walk.steps * walk.samples for walk in walks)
        done = sum(steps * walk.samples for steps, walk in zip(begun, walks, strict=True))
        with Bar(total, description, ranks.first and progress, "sample", done) as bar:
            for walk, steps in zip(walks, begun, strict=True):
                walk.run(bar.update, steps, resumable, schedule.overlap)
        with ranks.together(description):
            pass  # until all have come to the end
        own = [walk.own_scores() for walk in walks]
        states = [walk.states for walk in walks]
        return _results(skeleton, versions, sets, ranks.gather((own, states)))


class _VersionState(TypedDict):
    """changed: elements that differ. not_finite: where that was first seen. lost: a weight is not finite."""

    changed: int
    not_finite: str
    lost: bool
    seconds: float


class _State(TypedDict):
    """What a walk goes on from. of: digest of what is scored. done: steps."""

    of: str
    done: int
    versions: list[_VersionState]
    files: dict[str, FileRecord]
    before: NotRequired["_State"]


class _ScoreWalk:
    """See ``score_versions``. Part 0 is what lies before the layers, the last part what lies after them."""

    def __init__(
        self,
        skeleton: Skeleton,
        versions: Sequence[Version],
        sets: Sequence[SampleSet],
        schedule: Schedule,
        group: int,
        weights: PartWeights,
        folder: Path,
        ranks: Ranks,
    ) -> None:
        self._skeleton, self._versions, self._sets, self._ranks = skeleton, versions, sets, ranks
        self._weights, self._group = weights, group
        self._last = len(skeleton.layers) + 1
        self._batches = [batches_of(of_set.samples, schedule, group, skeleton.device, ranks) for of_set in sets]
        self.steps = len(versions) * (self._last + 1)
        self.samples = sum(len(batch.rows.numbers) for batches in self._batches for batch in batches)
        folder = folder if schedule.groups == 1 else folder / f"group-{group}"
        self._path = rank_path(folder, _RECORD, ranks.rank)
        self._scratch = ScratchFiles(rank_path(folder, _SCRATCH, ranks.rank))
        self.states = [_VersionState(changed=0, not_finite="", lost=False, seconds=0.0) for _ in versions]
        self._of = _digest(skeleton, versions, sets, schedule, ranks.world)
        self._recorded: _State | None = None
        self._trims = trims(skeleton.model)

    def resume(self, progress: Progress) -> int:
        """Go on from where an earlier call stopped; returns how many steps it has done."""
        state: _State | None = resume_step(
            self._path, lambda record: fits(record, _State) and record["done"] >= 0, self._ranks
        )
        with self._ranks.together("resume the walk"):
            if state is not None:
                if state["of"] != self._of:
                    raise InputError(
                        f"{self._path}: is of other samples or settings, or of a model that ran in another type, as on "
                        "another processor; start over with ‹overwrite›"
                    )
                if state["done"] > self.steps or len(state["versions"]) != len(self._versions):
                    raise InputError(f"{self._path}: is not the record of a walk")
                with Bar(self._scratch.size, "check scratch", self._ranks.first and progress) as bar:
                    self._scratch.restore(state["files"], bar.update)
                self.states = [state.copy() for state in state["versions"]]
                self._recorded = state
        return 0 if state is None else state["done"]

    def run(self, advance: Callable[[int], Any], begin: int, resumable: bool, ahead: bool) -> None:
        """Do all steps from number ``begin`` on."""
        if begin == self.steps:
            return
        skeleton = self._skeleton
        with (
            skeleton.partial_forward.installed(),
            ThreadPoolExecutor(1) as reader,
            _Behind(self, resumable, self._ranks.world == 1) as behind,
        ):
            if begin == 0 and self._group == 0:
                with skeleton.in_memory([*skeleton.vocabulary, *skeleton.resident]):
                    skeleton.check_chain(sample for of_set in self._sets for sample in of_set.samples)
            for part in range(begin // len(self._versions), self._last + 1):
                names = self._parameters(part)
                self._weights.hold(names)
                if ahead and part < self._last:
                    reader.submit(fetch, self._weights.inputs_of(self._parameters(part + 1)))
                for number in range(len(self._versions)):
                    step = part * len(self._versions) + number
                    if step >= begin:
                        started = time.perf_counter()
                        self._step(part, number, names)
                        self.states[number]["seconds"] += time.perf_counter() - started
                        advance(self.samples)
                        behind.end_step(step + 1)
            behind.wait()

    def _parameters(self, part: int) -> list[str]:
        """Those of a part, with the resident ones, which a version may change too."""
        skeleton = self._skeleton
        if part == 0:
            own = [skeleton.embedding]
        elif part == self._last:
            own = [] if skeleton.head is None else [skeleton.head]
        else:
            own = skeleton.by_layer[part - 1]
        return [*own, *skeleton.resident]

    def _step(self, part: int, number: int, names: Sequence[str]) -> None:
        state = self.states[number]
        if not state["lost"]:
            try:
                values, changed = self._weights.of(self._versions[number], names)
            except NotFiniteError as error:
                state["not_finite"], state["lost"] = str(error), True
            else:
                state["changed"] += sum(changed.get(name, 0) for name in self._counted(part))
                with torch.no_grad(), self._skeleton.holding(values):
                    for k in range(len(self._sets)):
                        self._run(part, number, k)
        for k in range(len(self._sets)):
            self._scratch.discard(_hidden(part, number, k))

    def _counted(self, part: int) -> list[str]:
        """The stored tensors of a part that no other part counts."""
        names = self._parameters(part)
        if part:
            resident = {*self._skeleton.resident, *([self._skeleton.head] if self._skeleton.tied else [])}
            names = [name for name in names if name not in resident]
        return self._skeleton.weights.needed(names)

    def _run(self, part: int, number: int, k: int) -> None:
        """Run one version of a part over the set ``k``."""
        forward, scores = self._skeleton.partial_forward, list[TokenScores]()
        for batch in self._batches[k]:
            mask = seen(batch.rows.input_ids, batch.mask, self._sets[k].hidden)
            if part == 0:
                hidden = forward.before_layers(batch.rows.input_ids, mask)
            else:
                hidden = self._scratch.read(_hidden(part, number, k), batch.rows)
                if part == self._last:
                    scores += self._score(batch.rows, hidden, self._sets[k])
                    continue
                hidden = forward.layer(part - 1, hidden, mask)
            self._look(part, number, k, batch, hidden)
            self._scratch.write(_hidden(part + 1, number, k), batch.rows, hidden)
        if part == self._last:
            self._scratch.put(_scores(number, k), as_columns(scores, self._sets[k].detailed))

    def _score(self, batch: MicroBatch, hidden: Tensor, of_set: SampleSet) -> list[TokenScores]:
        samples = Batch.of([of_set.samples[k] for k in batch.numbers], self._skeleton.device)

        def run(input_ids: Tensor, attention_mask: Tensor, **kept: Any) -> Any:
            return self._skeleton.partial_forward.after_layers(hidden, attention_mask, **kept)

        detailed = of_set.detailed
        return score_batch(run, samples, trims=self._trims, detailed=detailed, hits=False, hidden=of_set.hidden)

    def _look(self, part: int, number: int, k: int, batch: PaddedBatch, hidden: Tensor) -> None:
        """Note where hidden states are no longer finite for the first time."""
        if self.states[number]["not_finite"]:
            return
        finite = (torch.isfinite(hidden).all(2) | (batch.mask == 0)).all(1)
        if not bool(finite.all()):
            sample = batch.rows.numbers[int((~finite).nonzero()[0])]
            maker = f"layer {part - 1}" if part else "the embedding"
            self.states[number]["not_finite"] = (
                f"what {maker} makes of {self._sets[k].name} sample {sample} (counted from 0) is not finite"
            )

    def end_step(self, done: int) -> tuple[_State, StepFiles]:
        """What there is to record when ``done`` steps have been taken."""
        files, states = self._scratch.end_step(), [state.copy() for state in self.states]
        return _State(of=self._of, done=done, versions=states, files=files.files), files

    def record(self, state: _State, files: StepFiles) -> None:
        """Record a step, durably, and remove the files that no later step needs."""
        with self._ranks.together("the walk"):
            pass  # until all have run the step
        with self._ranks.together("the walk"):
            files.flush()
            record_step(self._path, state, self._recorded, self._ranks)
            self._recorded = state
        files.remove_discarded()

    def own_scores(self) -> list[list[dict[int, TokenScores]]]:
        """By version and set, the scores of this rank's samples of the group, by their numbers."""
        return [[self._own(number, k) for k in range(len(self._sets))] for number in range(len(self._versions))]

    def _own(self, number: int, k: int) -> dict[int, TokenScores]:
        of_set, numbers = self._sets[k], [sample for batch in self._batches[k] for sample in batch.rows.numbers]
        counts = [sum(label != IGNORED for label in of_set.samples[sample].labels[1:]) for sample in numbers]
        if self.states[number]["lost"]:
            columns = np.full((3 if of_set.detailed else 1, sum(counts)), np.nan, np.float32)
        else:
            columns = self._scratch.get(_scores(number, k)).numpy()
        split = np.split(columns, np.cumsum(counts)[:-1], axis=1) if numbers else []
        return {sample: from_columns(part) for sample, part in zip(numbers, split, strict=True)}


# Of each group, what ``own_scores`` gives, and the states of the versions.
_OfRank = tuple[list[list[list[dict[int, TokenScores]]]], list[list[_VersionState]]]


def _results(
    skeleton: Skeleton, versions: Sequence[Version], sets: Sequence[SampleSet], of_ranks: Sequence[_OfRank]
) -> list[VersionScores]:
    """What all versions score, from what all groups of all ranks have."""
    total = sum(math.prod(shape) for shape in skeleton.stored_shapes.values())
    results = []
    for number in range(len(versions)):
        scores = {}
        for k, of_set in enumerate(sets):
            own = [group[number][k] for groups, _ in of_ranks for group in groups]
            found = {sample: score for group in own for sample, score in group.items()}
            rows = by_row(of_set.samples)
            scores[of_set.name] = [TokenScores.joined([found[sample] for sample in row]) for row in rows]
        states = [[group[number] for group in groups] for _, groups in of_ranks]
        where = next((state["not_finite"] for of_rank in states for state in of_rank if state["not_finite"]), "")
        seconds = max(sum(state["seconds"] for state in of_rank) for of_rank in states)
        results.append(VersionScores(scores, states[0][0]["changed"] / total, where, seconds))
    return results


class _Behind:
    """Records each step while the next one goes on; with several ranks, which wait for each other, before it."""

    def __init__(self, walk: _ScoreWalk, resumable: bool, alone: bool) -> None:
        self._walk, self._resumable, self._alone = walk, resumable, alone
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "_Behind":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def end_step(self, done: int) -> None:
        state, files = self._walk.end_step(done)
        if not self._resumable:
            files.remove_discarded()
        elif self._alone:
            self.wait()
            self._pending = self._thread.submit(self._walk.record, state, files)
        else:
            self._walk.record(state, files)

    def wait(self) -> None:
        """Until the last step is recorded. Raises the error of its recording."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _digest(
    skeleton: Skeleton, versions: Sequence[Version], sets: Sequence[SampleSet], schedule: Schedule, world: int
) -> str:
    """By which a record knows what it is of."""
    digest = blake3()

    def add(*values: object) -> None:
        digest.update(json.dumps(values).encode())

    runs_in = torch_name(skeleton.model.dtype)
    cut = schedule.batch_size, schedule.groups
    add([version.name for version in versions], cut, len(skeleton.layers), runs_in, world)
    for of_set in sets:
        add(of_set.name, of_set.detailed, of_set.hidden)
        for sample in of_set.samples:
            add(sample.input_ids, sample.labels)
    return digest.hexdigest()


# Names of scratch files: of the hidden states that a part takes, and of finished scores.


def _hidden(part: int, number: int, k: int) -> str:
    return f"hidden-{part}-{number}-{k}"


def _scores(number: int, k: int) -> str:
    return f"scores-{number}-{k}"
