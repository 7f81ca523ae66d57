"""A process that streams an importance, or preconditions; prints its peak memory above what it held before, and the
estimate."""

import sys
from pathlib import Path

import torch

from perta_fast import estimate_importance, precondition
from perta_fast.streaming.forecast.costs import Estimate, Load
from perta_fast.streaming.forecast.preconditioning_costs import PreconditioningEstimate
from perta_fast.streaming.forecast.walk_costs import WalkEstimate
from perta_fast.streaming.model.structure import Structure
from perta_fast.streaming.schedule import Schedule
from tests.support.models import draw_samples, llama, nudge_, tokenizer, write_lines
from tests.support.peak_memory import peak_memory


def write(folder: Path, hidden: int, tied: bool) -> None:
    """A checkpoint of three layers."""
    model = llama(
        vocab_size=4000,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    for name in (folder, folder.with_name(f"{folder.name}-tuned")):
        model.save_pretrained(name)
        tokenizer().save_pretrained(name)
        nudge_(model, 1, 0.05)


def main(estimator: str, batch_size: int, tied: bool, folder: Path) -> None:
    """estimator: of importances, or "inputs" to precondition."""
    torch.set_num_threads(1)
    samples = draw_samples(3 if batch_size == 1 else 8, longest=200)
    data = write_lines(folder / "retain.jsonl", [{"text": "town " * 150}] * 8)

    def stream(name: str) -> None:
        if estimator == "inputs":
            precondition(
                folder / name,
                folder / f"{name}-tuned",
                data,
                folder / f"{name}-out",
                batch_size=batch_size,
                stream=True,
                progress=False,
            )
            return
        estimate_importance(
            folder / name,
            samples,
            estimator,
            batch_size=batch_size,
            out=folder / f"{name}-out",
            stream=True,
            progress=False,
        )

    write(folder / "tiny", 16, tied)
    stream("tiny")  # what torch allocates once
    write(folder / "model", 512, tied)
    structure, device = Structure.build(folder / "model"), torch.device("cpu")
    lengths = [len(sample.input_ids) for sample in samples]
    estimate: Estimate
    if estimator == "inputs":
        tokens = len(tokenizer()("town " * 150)["input_ids"])
        estimate = PreconditioningEstimate(structure, Load([[tokens] * 8], subtract=False), device)
    else:
        estimate = WalkEstimate(structure, Load([lengths], estimator == "empirical-fisher", subtract=False), device)
    costs = estimate.costs(Schedule(batch_size))
    with peak_memory() as memory:
        stream("model")
    print(memory.anonymous - memory.baseline, costs.host_bytes)
    print(costs.host, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "tied", Path(sys.argv[4]))
