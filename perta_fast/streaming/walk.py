"""The walk over a model's decoder layers, forward and back, with the weights of one in memory at a time.

Forward: the hidden states at each boundary between layers are spilled. Back: each layer is run again from what
it was given, and what its parameters are due is complete before the layer below is touched.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perta_fast.data import Sample
from perta_fast.errors import InputError
from perta_fast.importance.gradients import check_losses, gradients_folded_into
from perta_fast.importance.module_rules import EmbeddingRule, Target
from perta_fast.importance.per_sample import Plan, look_inputs, only_asking, plan_for
from perta_fast.losses import Batch, batches_by_length, per_sample_losses
from perta_fast.rules import Estimator
from perta_fast.streaming.passage import Passage
from perta_fast.streaming.skeleton import Skeleton
from perta_fast.streaming.spill import Piece, Spill

Means = dict[str, Tensor]
Run = Callable[[Piece, bool], None]


def steps(layer_count: int) -> int:
    """How often a walk handles each sample: before, through and after the layers, and back again."""
    return 2 * layer_count + 3


class Walk:
    """Importance of a skeleton's parameters on ``samples``; ``forward`` first, then ``backward``, once.

    ``one_by_one``: after ``forward``, the parameters that will take a backward pass for each sample.
    Memory: the weights of one layer (or of the input embedding, or the output head), 4 bytes for each of its
    parameters, and the activations of one batch in one layer. Scratch disk: the hidden states at every
    boundary, and two boundaries' gradients.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        samples: Sequence[Sample],
        estimator: Estimator,
        batch_size: int,
        scratch: Path,
        advance: Callable[[int], Any],
    ) -> None:
        self._skeleton = skeleton
        self._samples = samples
        self._squares = estimator == "empirical-fisher"
        self._advance = advance
        self._spill = Spill(scratch)
        self._passage = Passage(skeleton.model, skeleton.layers, str(skeleton.checkpoint.path))
        self._last = len(skeleton.layers)  # the boundary above all layers
        self._pieces: list[Piece] = []
        for numbers in batches_by_length(samples, batch_size):
            ids = Batch.of([samples[k] for k in numbers], skeleton.device).input_ids
            self._pieces.append(self._piece(ids, [len(samples[k].input_ids) for k in numbers], tuple(numbers)))
        ids, lengths = look_inputs(samples)
        self._look = self._piece(ids.to(skeleton.device), lengths.tolist())
        self._outside = Plan([])
        self._outside_targets: dict[str, Target] = {}
        self.one_by_one: list[str] = []

    def _piece(self, ids: Tensor, lengths: Sequence[int], numbers: tuple[int, ...] = ()) -> Piece:
        begin = self._pieces[-1].end if self._pieces else 0
        return Piece(ids, tuple(lengths), begin, numbers)

    @property
    def scratch_bytes(self) -> int:
        """Room that the scratch files take."""
        config: Any = self._skeleton.model.config
        row = config.get_text_config().hidden_size * config.dtype.itemsize
        return int(row * self._look.end * (self._last + 3))

    def forward(self) -> None:
        """Spill the hidden states at every boundary."""
        skeleton, spill = self._skeleton, self._spill
        left: list[str] = []
        with self._ready():
            self._check()
            with skeleton.in_memory([skeleton.embedding]), torch.no_grad():
                for piece in [*self._pieces, self._look]:
                    hidden = self._passage.before_layers(piece.input_ids, piece.attention_mask)
                    spill.write(_boundary(0), piece, hidden)
                    self._advance(len(piece.numbers))
            if self._squares:
                with skeleton.in_memory(skeleton.vocabulary):
                    left += self._plan_outside()
            for number, names in enumerate(skeleton.by_layer):
                with skeleton.in_memory(names), torch.no_grad():
                    plan = self._layer_plan(number, {name: _nowhere() for name in names})
                    left += plan.left
                    self._climb(number, self._look)
                    with plan.installed(skeleton.model):  # what the backward walk runs again, to the last bit
                        for piece in self._pieces:
                            plan.begin([self._samples[k] for k in piece.numbers])
                            self._climb(number, piece)
                            plan.finish()
                            self._advance(len(piece.numbers))
            self.one_by_one = [name for name in dict(skeleton.model.named_parameters()) if name in left]

    def _climb(self, number: int, piece: Piece) -> None:
        hidden = self._spill.read(_boundary(number), piece)
        self._spill.write(
            _boundary(number + 1), piece, self._passage.layer(number, hidden, piece.attention_mask)
        )

    def _check(self) -> None:
        """Try the model's structure on the beginning of one sample."""
        model = self._skeleton.model
        inside = {part for layer in self._skeleton.layers for part in layer.modules()}
        outside = [
            part for part in model.modules() if part not in inside and list(part.parameters(recurse=False))
        ]
        small = self._look.apart()[0]
        with self._skeleton.in_memory(self._skeleton.vocabulary), torch.enable_grad():
            self._passage.check(small.input_ids, small.attention_mask, outside)

    def backward(self, write: Callable[[Means], None]) -> None:
        """Hand means by parameter name, float32, to ``write``, in groups as they are complete; none is kept."""
        skeleton, spill = self._skeleton, self._spill
        with self._ready(), torch.enable_grad():
            self._after_layers(write)
            spill.remove(_boundary(self._last))
            for number in reversed(range(self._last)):
                with skeleton.in_memory(skeleton.by_layer[number]):
                    write(self._through_layer(number))
                spill.remove(_boundary(number))
                spill.remove(_gradient(number + 1))
            with skeleton.in_memory([skeleton.embedding]):
                write(self._before_layers())
            spill.remove(_gradient(0))

    @contextmanager
    def _ready(self) -> Iterator[None]:
        with self._passage.installed(), self._skeleton.in_memory(self._skeleton.resident):
            yield

    # What lies after the layers, and is done first.

    def _after_layers(self, write: Callable[[Means], None]) -> None:
        skeleton = self._skeleton
        head = [] if skeleton.head is None else [skeleton.head]
        names = [*skeleton.resident, *head]
        with skeleton.in_memory(head):
            self._resident = self._zeros(skeleton.resident)
            sums = self._resident | self._zeros(head)
            self._fold(names, sums, self._outside, self._lose)
        if skeleton.tied:
            self._spill.put("head", sums[skeleton.embedding])
        elif skeleton.head is not None:
            write(self._finished({skeleton.head: sums[skeleton.head]}))

    def _lose(self, piece: Piece, alone: bool) -> None:
        """Losses of a batch, and their gradient with respect to the last hidden states."""
        hidden = self._spill.read(_boundary(self._last), piece).requires_grad_(not alone)
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
                self._spill.put(f"head-{piece.begin}", rule.head_gradient)

    # A layer.

    def _through_layer(self, number: int) -> Means:
        names = self._skeleton.by_layer[number]
        sums = self._zeros(names)
        plan = self._layer_plan(number, {name: Target(total, None) for name, total in sums.items()})

        def run(piece: Piece, alone: bool) -> None:
            hidden = self._spill.read(_boundary(number), piece).requires_grad_(not alone)
            result = self._passage.layer(number, hidden, piece.attention_mask)
            if result.requires_grad:
                result.backward(self._spill.read(_gradient(number + 1), piece))
            if not alone:
                self._keep_gradient(number, piece, hidden)

        self._fold(names, sums, plan, run)
        return self._finished(sums)

    def _layer_plan(self, number: int, targets: dict[str, Target]) -> Plan:
        if not self._squares or not targets:
            return Plan([])
        hidden = self._spill.read(_boundary(number), self._look)

        def run(attention_mask: Tensor, **inputs: Any) -> Tensor:
            return self._passage.layer(number, hidden, attention_mask)

        return plan_for(self._skeleton.model, self._samples, targets, run)

    # What lies before the layers, and is done last.

    def _before_layers(self) -> Means:
        skeleton = self._skeleton
        sums = dict(self._resident)
        if skeleton.tied:
            sums[skeleton.embedding] = self._spill.take("head", skeleton.device)
        else:
            sums |= self._zeros([skeleton.embedding])
        self._fold([*skeleton.resident, skeleton.embedding], sums, self._outside, self._embed)
        return self._finished(sums)

    def _embed(self, piece: Piece, alone: bool) -> None:
        hidden = self._passage.before_layers(piece.input_ids, piece.attention_mask)
        if hidden.requires_grad:
            hidden.backward(self._spill.read(_gradient(0), piece))
        for rule in self._embedding_rules():
            if self._skeleton.tied and not alone and self._skeleton.embedding_part is rule.module:
                rule.head_gradient = self._spill.take(f"head-{piece.begin}", self._skeleton.device)

    def _plan_outside(self) -> list[str]:
        """Choose the rules of what lies before and after the layers; return the parameters that none fits."""
        skeleton = self._skeleton
        hidden = self._spill.read(_boundary(0), self._look)  # as good as the last for the look

        def run(input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
            return self._passage.after_layers(hidden, attention_mask, input_ids)

        self._outside_targets = {name: _nowhere() for name in (*skeleton.vocabulary, *skeleton.resident)}
        self._outside = plan_for(skeleton.model, self._samples, self._outside_targets, run)
        if skeleton.tied and skeleton.embedding in self._outside.left:
            raise InputError(
                f"{skeleton.checkpoint.path}: {skeleton.embedding} is used before and after the layers in "
                "a way that no batched rule fits; stream with the estimator grad, or do not stream"
            )
        return self._outside.left

    def _embedding_rules(self) -> list[EmbeddingRule]:
        return [rule for rule in self._outside.rules if isinstance(rule, EmbeddingRule)]

    # Every part.

    def _fold(self, names: Sequence[str], sums: Means, plan: Plan, run: Run) -> None:
        """Run all batches through one part of the model; what its parameters are due goes into ``sums``.

        run: takes a batch, or one sample alone for parameters that no batched rule fits.
        """
        model = self._skeleton.model
        if not self._squares:
            with gradients_folded_into(model, sums, squared=False):
                for piece in self._pieces:
                    run(piece, False)
                    self._advance(len(piece.numbers))
            return
        for name in names:
            if name in self._outside_targets:
                self._outside_targets[name].fisher = sums[name]
        with plan.installed(model):
            for piece in self._pieces:
                plan.begin([self._samples[k] for k in piece.numbers])
                run(piece, False)
                plan.finish()
                self._advance(len(piece.numbers))
        left = {name: sums[name] for name in names if name in plan.left}
        if left:
            with only_asking(model, left), gradients_folded_into(model, left, squared=True):
                for piece in self._pieces:
                    for alone in piece.apart():
                        run(alone, True)
        for target in self._outside_targets.values():
            target.fisher = torch.empty(0)  # its memory is for the layers

    def _keep_gradient(self, number: int, piece: Piece, hidden: Tensor) -> None:
        assert hidden.grad is not None
        self._spill.write(_gradient(number), piece, hidden.grad)

    def _zeros(self, names: Sequence[str]) -> Means:
        parameters = dict(self._skeleton.model.named_parameters())
        device = self._skeleton.device
        return {name: torch.zeros(parameters[name].shape, device=device) for name in names}

    def _finished(self, sums: Means) -> Means:
        for total in sums.values():
            total.div_(len(self._samples))
            if self._squares:
                total.clamp_(min=0)  # as in ``accumulate``
        return sums


def _nowhere() -> Target:
    """A target for a look that folds nothing."""
    return Target(torch.empty(0), None)


def _boundary(number: int) -> str:
    return f"hidden-{number}"


def _gradient(number: int) -> str:
    return f"gradient-{number}"
