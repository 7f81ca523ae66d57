"""A process that prints the peak memory of ``accumulate``, its bound, and what a plain backward pass takes.

All three in bytes above the weights. The bound is computed from the model: accumulators, the gradients of its
largest layer, the activations that autograd saves for one batch, and slack for the allocator.
"""

import torch
from transformers import LlamaForCausalLM

from perta_fast.data.batches import Batch, batches_by_length
from perta_fast.importance.gradients import accumulate
from perta_fast.models.losses import per_sample_losses
from tests.support.models import draw_samples, llama
from tests.support.peak_memory import peak_memory

SLACK = 16 << 20
SAMPLES = draw_samples(8, vocabulary=2048, longest=4)
BATCH_SIZE = 4


def build(hidden: int, layers: int) -> LlamaForCausalLM:
    return llama(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    ).eval()


def size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def saved_activations(model: LlamaForCausalLM) -> int:
    """Bytes that autograd keeps between the forward and the backward pass, weights not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    numbers = next(batches_by_length(SAMPLES, BATCH_SIZE))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = per_sample_losses(model, Batch.of([SAMPLES[k] for k in numbers]))
        total = sum(storages.values())
        del losses
    return total


def main() -> None:
    torch.set_num_threads(1)
    accumulate(build(16, 1), SAMPLES, "grad", BATCH_SIZE, progress=False)  # what torch allocates once
    model = build(512, 8)
    activations = saved_activations(model)
    parts = [list(model.get_input_embeddings().parameters()), list(model.lm_head.parameters())]
    parts += [list(layer.parameters()) for layer in model.model.layers]
    weights = size(list(model.parameters()))
    bound = weights + max(map(size, parts)) + activations + SLACK
    with peak_memory() as ours:
        accumulators = accumulate(model, SAMPLES, "grad", BATCH_SIZE, progress=False)
    with peak_memory() as plain:
        per_sample_losses(model, Batch.of(SAMPLES)).sum().backward()
    del accumulators
    print(ours.anonymous - ours.baseline, bound, weights + plain.anonymous - plain.baseline)


if __name__ == "__main__":
    main()
