"""The inputs of linear maps, seen with the weights of one decoder layer in memory at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perta_fast.data.batches import batches_of_one_length
from perta_fast.data.samples import Sample
from perta_fast.errors import InputError
from perta_fast.preconditioning.input_moments import Moments
from perta_fast.streaming.micro_batch import micro_batches
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.scratch_files import ScratchFiles


def layer_of_maps(structure: Structure, maps: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """The maps of each decoder layer, by name. Raises InputError if one lies outside the layers."""
    found: list[dict[str, nn.Module]] = []
    for names in structure.by_layer:
        inside = set(names)
        found.append({name: layer for name, layer in maps.items() if f"{name}.weight" in inside})
    outside = maps.keys() - {name for layer in found for name in layer}
    if outside:
        raise InputError(
            f"{structure.path}: {min(outside)} is a linear map outside the decoder layers, whose inputs a "
            "streamed run does not see; leave ‹stream› out, or take another rule"
        )
    return found


@torch.no_grad()
def layer_moments(
    skeleton: Skeleton,
    maps: Mapping[str, nn.Module],
    samples: Sequence[Sample],
    batch_size: int,
    scratch: ScratchFiles,
    advance: Callable[[int], Any],
    first: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """``input_moments`` of the maps of one layer after the other, the same bits; from layer ``first`` on.

    scratch: for the hidden states between layers, of all tokens, twice. Those that a layer was given are there until
    the caller ends the step; for a ``first`` above 0, those that this layer is given must be there. advance: called
    with the number of samples that a part of the model has been run for; there are ``len(skeleton.layers) + 1`` parts.
    Memory: the weights of one layer and 4 d_in² bytes for each different input of its maps. What is yielded is emptied
    before the next layer. Raises NotFiniteError as ``input_moments`` does.
    """
    by_layer = layer_of_maps(skeleton, maps)
    batches = micro_batches(samples, batches_of_one_length(samples, batch_size), skeleton.device)
    forward = skeleton.partial_forward
    with forward.installed(), skeleton.in_memory(skeleton.resident):
        if first == 0:
            with skeleton.in_memory(skeleton.vocabulary):
                skeleton.check_chain(samples)
                for batch in batches:
                    scratch.write("hidden-0", batch, forward.before_layers(batch.input_ids, batch.attention_mask))
                    advance(len(batch.numbers))
        for number in range(first, len(by_layer)):
            moments, of_layer = Moments(), by_layer[number]
            with skeleton.in_memory(skeleton.by_layer[number]):
                with moments.of(of_layer):
                    for batch in batches:
                        hidden = scratch.read(f"hidden-{number}", batch)
                        result = forward.layer(number, hidden, batch.attention_mask)
                        moments.last = None
                        if number + 1 < len(by_layer):
                            scratch.write(f"hidden-{number + 1}", batch, result)
                        advance(len(batch.numbers))
                means = moments.means(of_layer)
            del moments
            scratch.discard(f"hidden-{number}")
            yield means
            means.clear()  # their memory is free for the next layer
