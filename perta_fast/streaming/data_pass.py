"""One data set that runs through the parts of a model, forward and back.

Shapes: N samples of a micro-batch, T tokens of the longest of them, d the hidden width.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.data.samples import Sample, row_count
from perta_fast.distributed.ranks import Ranks, deal
from perta_fast.errors import InputError, NotFiniteError
from perta_fast.importance.gradients import check_losses, gradients_accumulated_into
from perta_fast.importance.per_sample import Plan, gradients_only_for, plan_for, probe_inputs
from perta_fast.importance.per_sample_modules import EmbeddingFisher, Target
from perta_fast.models.losses import per_sample_losses
from perta_fast.rules import Estimator
from perta_fast.streaming.micro_batch import MicroBatch, micro_batches
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.schedule import Schedule
from perta_fast.streaming.scratch_files import FileRecord, ScratchFiles, StepFiles

Means = dict[str, Tensor]  # float32, by parameter name


class PassRecord(TypedDict):
    """What a pass needs to be resumed: its ``one_by_one`` and its scratch files."""

    one_by_one: list[str]
    files: dict[str, FileRecord]


class DataPass:
    """Importance of a skeleton's parameters on ``samples``, part by part, in the order of ``walk.steps_of``.

    share: numbers of the samples that this process runs, maybe none; all processes probe with the same samples, so
    their plans agree. The methods need the weights of their part and the resident ones in memory, and the skeleton's
    partial forward installed. Those that go back return the means that they complete: the share's part of the means
    over all samples.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        samples: Sequence[Sample],
        share: Sequence[int],
        estimator: Estimator,
        schedule: Schedule,
        folder: Path,
        advance: Callable[[int], Any],
    ) -> None:
        self._skeleton, self._samples, self._schedule, self._advance = skeleton, samples, schedule, advance
        self._partial_forward = skeleton.partial_forward
        self._squares = estimator == "empirical-fisher"
        self.scratch = ScratchFiles(folder)
        self._top = len(skeleton.layers)  # the boundary above all layers
        batches = batches_by_length([samples[k] for k in share], schedule.batch_size)
        self._batches = [[share[k] for k in batch] for batch in batches]
        ids, lengths = probe_inputs(samples)
        self._probe = MicroBatch(ids.to(skeleton.device), tuple(lengths.tolist()), 0)
        # For what lies before and after the layers; None until ``plan_outside`` has been called.
        self.outside_plan = None if self._squares else Plan()
        self._outside_targets: dict[str, Target] = {}
        self._tied_fisher: EmbeddingFisher | None = None  # of an embedding that is the head too
        self._completed_last = [*skeleton.resident, *([skeleton.embedding] if skeleton.tied else [])]
        self._one_by_one: set[str] = set()

    def begin(self, group: int) -> None:
        """Take the samples of one of the schedule's groups."""
        self._group = group
        batches = self._schedule.of_group(self._batches, group)
        self._micro_batches = micro_batches(self._samples, batches, self._skeleton.device)

    @property
    def one_by_one(self) -> list[str]:
        """Parameters that take a backward pass for each sample; known after the forward steps."""
        return [name for name, _ in self._skeleton.model.named_parameters() if name in self._one_by_one]

    def restore(self, record: PassRecord, advance: Callable[[int], Any]) -> None:
        """Go on from where an earlier attempt stopped. advance: called with numbers of checked bytes."""
        self._one_by_one = set(record["one_by_one"])
        self.scratch.restore(record["files"], advance)

    def end_step(self) -> tuple[PassRecord, StepFiles]:
        """What ``restore`` needs, and the files to flush and to remove."""
        ended = self.scratch.end_step()
        return {"one_by_one": sorted(self._one_by_one), "files": ended.files}, ended

    # Forward.

    def check(self) -> None:
        """Try the model's structure on the beginning of one sample; needs the vocabulary in memory."""
        inside = {module for layer in self._skeleton.layers for module in layer.modules()}
        outside = [module for module in self._skeleton.model.modules() if module not in inside]
        with_parameters = [module for module in outside if list(module.parameters(recurse=False))]
        sample = self._probe.split()[0]
        with torch.enable_grad():
            self._partial_forward.check(sample.input_ids, sample.attention_mask, with_parameters)

    def embed(self) -> None:
        """Write the hidden states that the first layer takes."""
        with torch.no_grad():
            probe = [] if self._group else [self._probe]
            for batch in [*self._micro_batches, *probe]:
                hidden = self._partial_forward.before_layers(batch.input_ids, batch.attention_mask)
                self._write_hidden(0, batch, hidden, "the embedding")
                self._advance(len(batch.numbers))

    def forward(self, layer: int, recompute: bool = False) -> None:
        """Run a layer on the boundary below it, and discard that one unless the schedule keeps it.

        recompute: on the way back, for a boundary that was discarded.
        """
        with torch.no_grad():
            plan = self._layer_plan(layer, {name: Target.unused() for name in self._skeleton.by_layer[layer]})
            if self._group == 0 and not recompute:  # else a record names the probe's file, which must not change
                self._one_by_one.update(plan.one_by_one)
                self._forward(layer, self._probe)
            with plan.installed(self._skeleton.model):  # as on the way back, for the same bits
                for batch in self._micro_batches:
                    with plan.batch(batch.lengths):
                        self._forward(layer, batch)
                    self._advance(len(batch.numbers))
        if not recompute and layer % self._schedule.every:
            self.scratch.discard(self._hidden_file(layer))

    def _forward(self, layer: int, batch: MicroBatch) -> None:
        hidden = self._partial_forward.layer(layer, self._read_hidden(layer, batch), batch.attention_mask)
        self._write_hidden(layer + 1, batch, hidden, f"layer {layer}")

    def _read_hidden(self, boundary: int, batch: MicroBatch) -> Tensor:
        return self.scratch.read(self._hidden_file(boundary, batch), batch)

    def _write_hidden(self, boundary: int, batch: MicroBatch, hidden: Tensor, maker: str) -> None:
        """Store hidden states (N, T, d). Raises NotFiniteError, with the samples, if some are not finite."""
        finite = (torch.isfinite(hidden).all(2) | (batch.attention_mask == 0)).all(1)
        if batch.numbers and not bool(finite.all()):
            bad = [str(batch.numbers[k]) for k in (~finite).nonzero().flatten().tolist()]
            raise NotFiniteError(
                f"sample {', '.join(bad)} (counted from 0): what {maker} makes of it is not finite; look at the sample "
                "and at the weights there, or run the model in float32 or bfloat16"
            )
        self.scratch.write(self._hidden_file(boundary, batch), batch, hidden)

    # Back. What lies after the layers comes first.

    def plan_outside(self) -> None:
        """Plan for what lies before and after the layers; needs the vocabulary in memory."""
        skeleton = self._skeleton
        hidden = self._read_hidden(0, self._probe)  # any hidden states show how the head is called

        def run(input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
            states = self._probe_states(hidden, attention_mask)
            return self._partial_forward.after_layers(states, attention_mask, input_ids)

        self._outside_targets = {name: Target.unused() for name in (*skeleton.vocabulary, *skeleton.resident)}
        plan = plan_for(skeleton.model, self._samples, self._outside_targets, run)
        if skeleton.tied and skeleton.embedding in plan.one_by_one:
            raise InputError(
                f"{skeleton.checkpoint.path}: {skeleton.embedding} is used before and after the layers in a way that "
                "gives no per-sample squares in a batch; stream with the estimator grad, or do not stream"
            )
        self.outside_plan = plan
        self._one_by_one.update(plan.one_by_one)
        for fisher in plan.modules if skeleton.tied else ():
            if isinstance(fisher, EmbeddingFisher) and fisher.module is skeleton.embedding_module:
                self._tied_fisher = fisher

    def head(self) -> Means:
        """Back through what lies after the layers. Completes the head, unless it is tied."""
        skeleton = self._skeleton
        sums = self._sums([*self._completed_last, *([] if skeleton.head is None or skeleton.tied else [skeleton.head])])
        self._accumulate(sums, self.outside_plan, self._head)
        self.scratch.discard(self._hidden_file(self._top))
        for name in self._completed_last:
            self.scratch.put(f"waiting-{name}", sums.pop(name))
        return self._complete(sums)

    def _head(self, batch: MicroBatch, single: bool) -> None:
        """Back-propagate the losses of a batch to the last hidden states."""
        hidden = self._read_hidden(self._top, batch).requires_grad_(not single)
        ids = batch.input_ids if self._skeleton.tied else None

        def run(**inputs: Any) -> Any:
            return self._partial_forward.after_layers(hidden, inputs["attention_mask"], ids)

        samples = Batch.of([self._samples[k] for k in batch.numbers], self._skeleton.device)
        losses = per_sample_losses(run, samples)
        check_losses(losses, batch.numbers)
        if losses.requires_grad:
            losses.sum().backward()
        if single:
            return
        self._write_gradient(self._top, batch, hidden)
        if self._tied_fisher is not None and self._tied_fisher.head_gradient is not None:
            self.scratch.put(self._head_file(batch), self._tied_fisher.head_gradient)

    def backward(self, layer: int) -> Means:
        """Back through a layer. Completes its parameters."""
        sums = self._sums(self._skeleton.by_layer[layer])
        plan = self._layer_plan(layer, {name: Target(total) for name, total in sums.items()})

        def run(batch: MicroBatch, single: bool) -> None:
            hidden = self._read_hidden(layer, batch).requires_grad_(not single)
            result = self._partial_forward.layer(layer, hidden, batch.attention_mask)
            if result.requires_grad:
                result.backward(self.scratch.read(self._gradient_file(layer + 1), batch))
            if not single:
                self._write_gradient(layer, batch, hidden)

        self._accumulate(sums, plan, run)
        self.scratch.discard(self._hidden_file(layer))
        self.scratch.discard(self._gradient_file(layer + 1))
        return self._complete(sums)

    def _layer_plan(self, layer: int, targets: Mapping[str, Target]) -> Plan:
        if not self._squares or not targets:
            return Plan()
        hidden = self._read_hidden(layer, self._probe)

        def run(attention_mask: Tensor, **inputs: Any) -> Tensor:
            return self._partial_forward.layer(layer, self._probe_states(hidden, attention_mask), attention_mask)

        return plan_for(self._skeleton.model, self._samples, targets, run)

    def _probe_states(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states for ``attention_mask`` (N, T), from those that the first probe has.

        For the second probe these are states of any tokens: they show as well how modules are called.
        """
        if attention_mask.shape == hidden.shape[:2]:
            return hidden
        real = hidden[self._probe.attention_mask.bool()]
        numbers = torch.arange(attention_mask.numel(), device=real.device) % len(real)
        return real[numbers].view(*attention_mask.shape, -1)

    def embed_backward(self) -> Means:
        """Back through what lies before the layers. Completes all other parameters."""
        skeleton = self._skeleton
        sums = {name: self.scratch.take(f"waiting-{name}", skeleton.device) for name in self._completed_last}
        if not skeleton.tied:
            sums |= self._sums([skeleton.embedding])
        self._accumulate(sums, self.outside_plan, self._embed_backward)
        self.scratch.discard(self._gradient_file(0))
        return self._complete(sums)

    def _embed_backward(self, batch: MicroBatch, single: bool) -> None:
        hidden = self._partial_forward.before_layers(batch.input_ids, batch.attention_mask)
        if hidden.requires_grad:
            hidden.backward(self.scratch.read(self._gradient_file(0), batch))
        if self._tied_fisher is not None and not single:
            self._tied_fisher.head_gradient = self.scratch.take(self._head_file(batch), self._skeleton.device)

    def _accumulate(self, sums: Means, plan: Plan | None, run: Callable[[MicroBatch, bool], None]) -> None:
        """Run all micro-batches through one part of the model, and add its parameters' gradients to ``sums``.

        run: takes a micro-batch, and whether it is a single sample, for the parameters in ``plan.one_by_one``.
        """
        assert plan is not None
        model = self._skeleton.model
        for name in sums.keys() & self._outside_targets.keys():
            self._outside_targets[name].fisher = sums[name]
        batched = plan.installed(model) if self._squares else gradients_accumulated_into(model, sums, squared=False)
        with torch.enable_grad():
            with batched:
                for batch in self._micro_batches:
                    with plan.batch(batch.lengths):
                        run(batch, False)
                    self._advance(len(batch.numbers))
            others = {name: total for name, total in sums.items() if name in plan.one_by_one}
            if others:
                with gradients_only_for(model, others), gradients_accumulated_into(model, others, squared=True):
                    for batch in self._micro_batches:
                        for single in batch.split():
                            run(single, True)
        for target in self._outside_targets.values():
            target.fisher = torch.empty(0)  # frees memory for the layers

    def _write_gradient(self, boundary: int, batch: MicroBatch, hidden: Tensor) -> None:
        assert hidden.grad is not None
        self.scratch.write(self._gradient_file(boundary), batch, hidden.grad)

    def _sums(self, names: Sequence[str]) -> Means:
        """Zeros, or the sums of the groups so far."""
        device = self._skeleton.device
        if self._group:
            return {name: self.scratch.take(f"sum-{name}-{self._group - 1}", device) for name in names}
        parameters = dict(self._skeleton.model.named_parameters())
        return {name: torch.zeros(parameters[name].shape, dtype=torch.float32, device=device) for name in names}

    def _complete(self, sums: Means) -> Means:
        """The means after the last group; after another, nothing: it puts its sums on disk."""
        if self._group < self._schedule.groups - 1:
            for name, total in sums.items():
                self.scratch.put(f"sum-{name}-{self._group}", total)
            return {}
        for total in sums.values():
            total.div_(row_count(self._samples))
            if self._squares:
                total.clamp_(min=0)  # as in ``importance.gradients.accumulate``
        return sums

    # Names of scratch files. Each group has its own, as those of the last one may still be there.

    def _hidden_file(self, boundary: int, batch: MicroBatch | None = None) -> str:
        return f"probe-{boundary}" if batch is self._probe else f"hidden-{boundary}-{self._group}"

    def _gradient_file(self, boundary: int) -> str:
        return f"gradient-{boundary}-{self._group}"

    def _head_file(self, batch: MicroBatch) -> str:
        return f"head-{batch.first_row}-{self._group}"


def share_of(samples: Sequence[Sample], ranks: Ranks) -> list[int]:
    """The numbers of the samples that this rank runs."""
    return deal([len(sample.input_ids) for sample in samples], ranks.world)[ranks.rank]


def sum_over_ranks_(means: Sequence[Means], ranks: Ranks) -> None:
    """Add up over ``ranks``, in place, their parts of the means of each data set."""
    pending = [ranks.sum_async_(mean) for of_set in means for mean in of_set.values()]
    for one_sum in pending:
        one_sum.wait()
