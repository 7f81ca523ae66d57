"""One data set on its way through a model's parts: before, through and after the layers, and back again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import Sample
from perta_fast.distributed.dealing import deal
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError, NotFiniteError
from perta_fast.importance.gradients import check_losses, gradients_folded_into
from perta_fast.importance.per_sample import Plan, look_inputs, only_asking, plan_for
from perta_fast.importance.per_sample_modules import EmbeddingRule, Target
from perta_fast.models.losses import per_sample_losses
from perta_fast.rules import Estimator
from perta_fast.streaming.model.passage import Passage
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.scratch_files import FileState, Piece, Settled, Spill

Means = dict[str, Tensor]
_Run = Callable[[Piece, bool], None]


class PassState(TypedDict):
    """What a pass needs to be taken up again: its ``one_by_one`` so far, and its spill."""

    left: list[str]
    files: dict[str, FileState]


class DataPass:
    """Importance of a skeleton's parameters on ``samples``, part by part; ``walk`` gives the order.

    share: numbers of the samples that this process runs, maybe none. What the look goes over is the same for
    every share, and so are the rules that it chooses.

    Each method wants the weights of its part, and the resident ones, in memory, and the passage installed.
    Those that go back return what has become complete: by parameter name, float32, what the share adds to the
    means over all samples.
    ``one_by_one``: once all layers were climbed, the parameters that take a backward pass for each sample.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        passage: Passage,
        samples: Sequence[Sample],
        share: Sequence[int],
        estimator: Estimator,
        schedule: Schedule,
        scratch: Path,
        advance: Callable[[int], Any],
    ) -> None:
        self._skeleton = skeleton
        self._passage = passage
        self._samples = samples
        self._squares = estimator == "empirical-fisher"
        self._schedule = schedule
        self._advance = advance
        self.spill = Spill(scratch)
        self._last = len(skeleton.layers)  # the boundary above all layers
        batches = batches_by_length([samples[k] for k in share], schedule.batch_size)
        self._batches = [[share[k] for k in each] for each in batches]
        ids, lengths = look_inputs(samples)
        self._look = Piece(ids.to(skeleton.device), tuple(lengths.tolist()), 0)
        self._outside: Plan | None = None
        self._outside_targets: dict[str, Target] = {}
        self._left: set[str] = set()
        self.begin(0)

    def begin(self, group: int) -> None:
        """Turn to one of the schedule's groups of samples."""
        self._group = group
        self._pieces: list[Piece] = []
        rows = 0
        for numbers in self._schedule.of_group(self._batches, group):
            ids = Batch.of([self._samples[k] for k in numbers], self._skeleton.device).input_ids
            lengths = [len(self._samples[k].input_ids) for k in numbers]
            self._pieces.append(Piece(ids, tuple(lengths), rows, tuple(numbers)))
            rows = self._pieces[-1].end

    @property
    def one_by_one(self) -> list[str]:
        """In the order of the model's parameters."""
        return [name for name, _ in self._skeleton.model.named_parameters() if name in self._left]

    def restore(self, state: PassState, advance: Callable[[int], Any]) -> None:
        """Go on from where an earlier attempt had come; ``advance`` is told the bytes that were checked."""
        self._left = set(state["left"])
        self.spill.restore(state["files"], advance)

    def settle(self) -> tuple[PassState, Settled]:
        """End a step: what ``restore`` will need, and what is still to be done with the files."""
        settled = self.spill.settle()
        return {"left": sorted(self._left), "files": settled.files}, settled

    # Forward.

    def check(self) -> None:
        """Try the model's structure on the beginning of one sample; wants the vocabulary in memory."""
        model = self._skeleton.model
        inside = {part for layer in self._skeleton.layers for part in layer.modules()}
        outside = [
            part for part in model.modules() if part not in inside and list(part.parameters(recurse=False))
        ]
        small = self._look.apart()[0]
        with torch.enable_grad():
            self._passage.check(small.input_ids, small.attention_mask, outside)

    def embed(self) -> None:
        """Spill what the first layer is given."""
        with torch.no_grad():
            for piece in self._pieces:
                self._embed(piece, self._boundary(0))
                self._advance(len(piece.numbers))
            if self._group == 0:
                self._embed(self._look, _look(0))

    def _embed(self, piece: Piece, above: str) -> None:
        hidden = self._passage.before_layers(piece.input_ids, piece.attention_mask)
        _check_finite(hidden, piece, "the embedding")
        self.spill.write(above, piece, hidden)

    def climb(self, number: int, again: bool = False) -> None:
        """Spill what layer ``number`` makes of the boundary below it, which goes unless it is one that stays.

        again: on the way back, only to have the boundary once more.
        """
        with torch.no_grad():
            plan = self._layer_plan(number, {name: _nowhere() for name in self._skeleton.by_layer[number]})
            if self._group == 0 and not again:  # what a record names is not written again
                self._left.update(plan.left)
                self._climb(number, self._look, _look(number), _look(number + 1))
            with plan.installed(self._skeleton.model):  # what the way back runs again, to the last bit
                for piece in self._pieces:
                    plan.begin([self._samples[k] for k in piece.numbers])
                    self._climb(number, piece, self._boundary(number), self._boundary(number + 1))
                    plan.finish()
                    self._advance(len(piece.numbers))
        if not again and number % self._schedule.every:
            self.spill.forget(self._boundary(number))

    def _climb(self, number: int, piece: Piece, below: str, above: str) -> None:
        hidden = self._passage.layer(number, self.spill.read(below, piece), piece.attention_mask)
        _check_finite(hidden, piece, f"layer {number}")
        self.spill.write(above, piece, hidden)

    # What lies after the layers, and is done first on the way back.

    @property
    def wants_plan(self) -> bool:
        """Whether ``plan_outside`` is still to be called."""
        return self._squares and self._outside is None

    def plan_outside(self) -> None:
        """Choose the rules of what lies before and after the layers; wants the vocabulary in memory."""
        skeleton = self._skeleton
        hidden = self.spill.read(_look(0), self._look)  # as good as the last for the look

        def run(input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
            return self._passage.after_layers(hidden, attention_mask, input_ids)

        self._outside_targets = {name: _nowhere() for name in (*skeleton.vocabulary, *skeleton.resident)}
        self._outside = plan_for(skeleton.model, self._samples, self._outside_targets, run)
        if skeleton.tied and skeleton.embedding in self._outside.left:
            raise InputError(
                f"{skeleton.checkpoint.path}: {skeleton.embedding} is used before and after the layers in "
                "a way that no batched rule fits; stream with the estimator grad, or do not stream"
            )
        self._left.update(self._outside.left)

    def head(self) -> Means:
        """Back through what lies after the layers: the head's means, unless it is tied."""
        skeleton = self._skeleton
        head = [] if skeleton.head is None else [skeleton.head]
        sums = self._sums([*skeleton.resident, *head])
        self._fold(sums, self._outside, self._lose)
        self.spill.forget(self._boundary(self._last))
        for name in [*skeleton.resident, *(head if skeleton.tied else [])]:
            self.spill.put(_waiting(name), sums.pop(name))
        return self._kept(sums)

    def _lose(self, piece: Piece, alone: bool) -> None:
        """Losses of a batch, and their gradient with respect to the last hidden states."""
        hidden = self.spill.read(self._boundary(self._last), piece).requires_grad_(not alone)
        ids = piece.input_ids if self._skeleton.tied else None

        def run(**inputs: Any) -> Any:
            return self._passage.after_layers(hidden, inputs["attention_mask"], ids)

        batch = Batch.of([self._samples[k] for k in piece.numbers], self._skeleton.device)
        losses = per_sample_losses(run, batch)
        check_losses(losses, piece.numbers)
        if losses.requires_grad:
            losses.sum().backward()
        if alone:
            return
        self._keep_gradient(self._last, piece, hidden)
        for rule in self._embedding_rules():
            if rule.head_gradient is not None:
                self.spill.put(f"head-{piece.begin}-{self._group}", rule.head_gradient)

    # A layer.

    def layer(self, number: int) -> Means:
        """Back through a layer: its means."""
        sums = self._sums(self._skeleton.by_layer[number])
        plan = self._layer_plan(number, {name: Target(total, None) for name, total in sums.items()})

        def run(piece: Piece, alone: bool) -> None:
            hidden = self.spill.read(self._boundary(number), piece).requires_grad_(not alone)
            result = self._passage.layer(number, hidden, piece.attention_mask)
            if result.requires_grad:
                result.backward(self.spill.read(self._gradient(number + 1), piece))
            if not alone:
                self._keep_gradient(number, piece, hidden)

        self._fold(sums, plan, run)
        self.spill.forget(self._boundary(number))
        self.spill.forget(self._gradient(number + 1))
        return self._kept(sums)

    def _layer_plan(self, number: int, targets: dict[str, Target]) -> Plan:
        if not self._squares or not targets:
            return Plan([])
        hidden = self.spill.read(_look(number), self._look)

        def run(attention_mask: Tensor, **inputs: Any) -> Tensor:
            return self._passage.layer(number, hidden, attention_mask)

        return plan_for(self._skeleton.model, self._samples, targets, run)

    # What lies before the layers, and is done last.

    def end(self) -> Means:
        """Back through what lies before the layers: means of all that is left."""
        skeleton = self._skeleton
        waiting = [*skeleton.resident, *([skeleton.embedding] if skeleton.tied else [])]
        sums = {name: self.spill.take(_waiting(name), skeleton.device) for name in waiting}
        if not skeleton.tied:
            sums |= self._sums([skeleton.embedding])
        self._fold(sums, self._outside, self._unembed)
        self.spill.forget(self._gradient(0))
        return self._kept(sums)

    def _unembed(self, piece: Piece, alone: bool) -> None:
        hidden = self._passage.before_layers(piece.input_ids, piece.attention_mask)
        if hidden.requires_grad:
            hidden.backward(self.spill.read(self._gradient(0), piece))
        for rule in self._embedding_rules():
            if self._skeleton.tied and not alone and self._skeleton.embedding_part is rule.module:
                rule.head_gradient = self.spill.take(f"head-{piece.begin}-{self._group}", self._skeleton.device)

    def _embedding_rules(self) -> list[EmbeddingRule]:
        rules = [] if self._outside is None else self._outside.rules
        return [rule for rule in rules if isinstance(rule, EmbeddingRule)]

    # Every part.

    def _fold(self, sums: Means, plan: Plan | None, run: _Run) -> None:
        """Run all batches through one part of the model; what its parameters are due goes into ``sums``.

        run: takes a batch, or one sample alone for parameters that no batched rule fits.
        """
        model = self._skeleton.model
        with torch.enable_grad():
            if not self._squares:
                with gradients_folded_into(model, sums, squared=False):
                    for piece in self._pieces:
                        run(piece, False)
                        self._advance(len(piece.numbers))
                return
            assert plan is not None
            for name in sums.keys() & self._outside_targets.keys():
                self._outside_targets[name].fisher = sums[name]
            with plan.installed(model):
                for piece in self._pieces:
                    plan.begin([self._samples[k] for k in piece.numbers])
                    run(piece, False)
                    plan.finish()
                    self._advance(len(piece.numbers))
            left = {name: total for name, total in sums.items() if name in plan.left}
            if left:
                with only_asking(model, left), gradients_folded_into(model, left, squared=True):
                    for piece in self._pieces:
                        for alone in piece.apart():
                            run(alone, True)
            for target in self._outside_targets.values():
                target.fisher = torch.empty(0)  # its memory is for the layers

    def _keep_gradient(self, number: int, piece: Piece, hidden: Tensor) -> None:
        assert hidden.grad is not None
        self.spill.write(self._gradient(number), piece, hidden.grad)

    def _sums(self, names: Sequence[str]) -> Means:
        """Where the group before left off."""
        device = self._skeleton.device
        if self._group:
            return {name: self.spill.take(_sum(name, self._group - 1), device) for name in names}
        parameters = dict(self._skeleton.model.named_parameters())
        return {name: torch.zeros(parameters[name].shape, dtype=torch.float32, device=device) for name in names}

    def _kept(self, sums: Means) -> Means:
        """The means, after the last group; else nothing, and the sums wait on disk."""
        if self._group < self._schedule.groups - 1:
            for name, total in sums.items():
                self.spill.put(_sum(name, self._group), total)
            return {}
        for total in sums.values():
            total.div_(len(self._samples))
            if self._squares:
                total.clamp_(min=0)  # as in ``accumulate``
        return sums

    # Names in the spill. Each group has its own, as the files of the one before may still be on their way out.

    def _boundary(self, number: int) -> str:
        return f"hidden-{number}-{self._group}"

    def _gradient(self, number: int) -> str:
        return f"gradient-{number}-{self._group}"


def _nowhere() -> Target:
    """A target for a look that folds nothing."""
    return Target(torch.empty(0), None)


def _look(number: int) -> str:
    return f"look-{number}"


def _waiting(name: str) -> str:
    return f"waiting-{name}"


def _sum(name: str, group: int) -> str:
    return f"sum-{name}-{group}"


def _check_finite(hidden: Tensor, piece: Piece, maker: str) -> None:
    """Raise NotFiniteError, naming the samples, if hidden states (N, T, d) are not finite at a real token."""
    finite = (torch.isfinite(hidden).all(2) | (piece.attention_mask == 0)).all(1)
    if piece.numbers and not bool(finite.all()):
        bad = [str(piece.numbers[k]) for k in (~finite).nonzero().flatten().tolist()]
        raise NotFiniteError(
            f"sample {', '.join(bad)} (counted from 0): what {maker} makes of it is not finite; look at the "
            "sample and at the weights there, or run the model in float32 or bfloat16"
        )


def shares_of(samples: Sequence[Sample], ranks: int) -> list[list[int]]:
    """The numbers of the samples that each of so many ranks runs."""
    return deal([len(each.input_ids) for each in samples], ranks)


def add_up_(means: Sequence[Means], ranks: Ranks) -> None:
    """Add up over ``ranks``, in place, what each has for each data set: the means over all samples."""
    pending = [ranks.sum_async_(mean) for each in means for mean in each.values()]
    for each in pending:
        each.wait()
