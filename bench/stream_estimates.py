"""``python -m bench.stream_estimates`` prints what streamed runs of Llama 3.1 would take, as a table.

Shapes are those of the published models. Sizes and operations come from ``perta_fast.streaming.forecast.costs``.
The speeds of the machines are assumed: nothing here is measured.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig

from perta_fast.errors import InputError
from perta_fast.memory import format_size
from perta_fast.streaming.forecast.choice import Budget, choose_schedule, duration
from perta_fast.streaming.forecast.costs import Load
from perta_fast.streaming.forecast.rates import Rates
from perta_fast.streaming.forecast.walk_costs import WalkEstimate
from perta_fast.streaming.model.structure import Structure

SHAPES = {  # layers, hidden, intermediate, heads
    "8 B": (32, 4096, 14336, 32),
    "70 B": (80, 8192, 28672, 64),
    "405 B": (126, 16384, 53248, 128),
}


@dataclass(frozen=True)
class Machine:
    """A machine to estimate for. device_memory and disk: bytes that a run may use; CUDA keeps a gigabyte more."""

    name: str
    device_memory: int
    rates: Rates
    disk: int


MACHINES = (
    # 40 % of the data sheet's 989 TFLOP/s of dense bfloat16.
    Machine("H200, 141 GB", 140 * 10**9, Rates(0.4 * 989e12, 6e9, 5e9, "assumed"), 4 * 10**12),
    # 40 % of the 165 TFLOP/s of dense bfloat16 in the data sheet of a GeForce RTX 4090.
    Machine("24 GB card", 23 * 10**9, Rates(0.4 * 165e12, 3e9, 2.5e9, "assumed"), 2 * 10**12),
)


def structure_of(shape: tuple[int, int, int, int]) -> Structure:
    """The structure of a Llama 3.1 of this shape, from a configuration in a temporary directory."""
    layers, hidden, intermediate, heads = shape
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return Structure.build(Path(folder))


def main() -> None:
    """Print the table."""
    print("| model | tokens a sample | machine | batch, every, groups | GPU memory | host memory | scratch | time |")
    print("|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        structure = structure_of(shape)
        for tokens in (64, 512):
            load = Load([[tokens] * 400, [tokens] * 3600])
            estimate = WalkEstimate(structure, load, torch.device("cuda"), threads=8)
            for machine in MACHINES:
                budget = Budget(machine.disk + estimate.result_bytes, None, machine.device_memory)
                try:
                    chosen = choose_schedule(estimate, 32, budget)
                except InputError as error:
                    print(f"| {name} | {tokens} | {machine.name} | does not fit: {error} | | | | |")
                    continue
                schedule, costs = chosen.schedule, chosen.costs
                print(
                    f"| {name} | {tokens} | {machine.name} "
                    f"| {schedule.batch_size}, {schedule.every}, {schedule.groups}"
                    f"{'' if schedule.overlap else ', no overlap'} | {format_size(costs.device_bytes)} "
                    f"| {format_size(costs.host_bytes)} | {format_size(costs.scratch)} "
                    f"| {duration(machine.rates.seconds(costs, schedule.overlap))} |"
                )


if __name__ == "__main__":
    main()
