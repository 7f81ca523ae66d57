"""``python -m bench.stream_estimates`` prints what streamed runs of Llama 3.1 would take, as a table for each rule.

Shapes are those of the published models. Sizes and operations come from ``perta_fast.streaming.forecast``. The
speeds of the machines are assumed: nothing here is measured.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig

from perta_fast.errors import InputError
from perta_fast.memory import format_duration, format_size
from perta_fast.streaming.forecast.choice import Budget, choose_schedule
from perta_fast.streaming.forecast.costs import Estimate, Load
from perta_fast.streaming.forecast.preconditioning_costs import PreconditioningEstimate
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
    # 40 % of the data sheet's 989 TFLOP/s of dense bfloat16, and of its 67 TFLOP/s of float64.
    Machine("H200, 141 GB", 140 * 10**9, Rates(0.4 * 989e12, 6e9, 5e9, "assumed", 0.4 * 67e12), 4 * 10**12),
    # 40 % of a GeForce RTX 4090's 165 TFLOP/s of dense bfloat16, and of its 1.29 TFLOP/s of float64.
    Machine("24 GB card", 23 * 10**9, Rates(0.4 * 165e12, 3e9, 2.5e9, "assumed", 0.4 * 1.29e12), 2 * 10**12),
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
        return Structure.build(Path(folder), torch.bfloat16)


def main() -> None:
    """Print the tables."""
    structures = {name: structure_of(shape) for name, shape in SHAPES.items()}
    for rule in ("preconditioned", "fisher"):
        print(f"\nRule {rule}:\n")
        cut = "batch" if rule == "preconditioned" else "batch, every, groups"
        print(f"| model | tokens a sample | machine | {cut} | GPU memory | host memory | scratch | time |")
        print("|---|---|---|---|---|---|---|---|")
        for name, structure in structures.items():
            for tokens in (64, 512):
                for machine in MACHINES:
                    print(f"| {name} | {tokens} | {machine.name} | {_costs(rule, structure, tokens, machine)} |")


def _costs(rule: str, structure: Structure, tokens: int, machine: Machine) -> str:
    """The other cells of a line."""
    forget, retain = [tokens] * 400, [tokens] * 3600
    estimate: Estimate
    if rule == "preconditioned":
        estimate = PreconditioningEstimate(structure, Load([retain]), torch.device("cuda"), threads=8)
    else:
        estimate = WalkEstimate(structure, Load([forget, retain]), torch.device("cuda"), threads=8)
    try:
        chosen = choose_schedule(
            estimate, 32, Budget(machine.disk + estimate.result_bytes, None, machine.device_memory)
        )
    except InputError as error:
        return f"does not fit: {error} | | | |"
    schedule, costs = chosen.schedule, chosen.costs
    cut = f"{schedule.batch_size}" + (f", {schedule.every}, {schedule.groups}" if estimate.overlaps else "")
    cut += ", no overlap" if estimate.overlaps and not schedule.overlap else ""
    sizes = [format_size(size) for size in (costs.device_bytes, costs.host_bytes, costs.scratch)]
    return " | ".join([cut, *sizes, format_duration(machine.rates.seconds(costs, schedule.overlap))])


if __name__ == "__main__":
    main()
