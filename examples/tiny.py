"""The inputs of every example: a small model that knows made-up authors, and must forget some of them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from perta_fast.data.rows import load_rows
from perta_fast.data.samples import encode
from perta_fast.demo.checkpoints import train_models
from perta_fast.demo.clock import Clock
from perta_fast.demo.files import Files
from perta_fast.demo.scoring import score
from perta_fast.demo.settings import Settings

_SMALL = Settings(
    forget_authors=1,
    retain_authors=3,
    other_authors=8,
    hidden_size=64,
    layers=2,
    batch_size=8,
    pretraining_epochs=4,
    tuning_epochs=12,
    tuning_rate=3e-3,
)


@contextmanager
def tiny_job() -> Iterator[Path]:
    """A temporary directory with the checkpoints model, base and tuned, forget.jsonl and retain.jsonl."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # for matrices this small, more threads cost more time than they save
    with tempfile.TemporaryDirectory(prefix="perta-example-") as name:
        folder = Path(name)
        with redirect_stdout(StringIO()):
            train_models(Files(folder), _SMALL, 0, Clock())
        (folder / "full").rename(folder / "model")
        yield folder


def print_losses(name: str, folder: Path) -> None:
    """Print the mean losses of a checkpoint in ``folder``, in nats: higher where it knows less."""
    model = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    losses = [
        score(model, encode(load_rows(folder / f"{role}.jsonl"), tokenizer, 64)).loss for role in ("forget", "retain")
    ]
    print(f"{name:12} forget loss {losses[0]:5.2f}, retain loss {losses[1]:5.2f}")
