"""The trained models of one real model and one seed: theta_0, and theta_0 tuned on several choices of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.study import models as small
from bench.study.real.compute import tune_
from bench.study.real.data import Pair, Rows
from bench.study.real.settings import Settings
from bench.study.real.sources import SOURCES
from bench.study.store import Store, digest_of
from perta_fast.data.rows import rows_from
from perta_fast.data.samples import Sample, encode
from perta_fast.models.loading import choose_device

FULL_TUNING, LORA, ITSELF = "full tuning", "LoRA", "θ_full as"  # kinds of theta_f
_LINEAR = "all-linear"
load_tokenizer = cache(small.load_tokenizer)


@dataclass(frozen=True)
class Models:
    """The float32 checkpoints of one model and seed, as pieces of ``store``.

    A path asked for with ``make=False`` says only where the checkpoint would be: what was measured of it may be there
    when it is not. untied: the output head is made a matrix of its own before anything is trained.
    """

    name: str
    rows: Rows
    settings: Settings
    seed: int
    store: Store
    untied: bool = False

    @property
    def folder(self) -> str:
        """Where the pieces of this model and seed lie."""
        return f"{self.shared_folder}/seed{self.seed}"

    @property
    def shared_folder(self) -> str:
        """Where the pieces lie that all seeds share."""
        return f"{self.name}{' untied' if self.untied else ''}"

    def base(self, make: bool = True) -> Path:
        """theta_0."""
        of_source = {"package": SOURCES[self.name].package}
        source = self._piece(f"{self.name}/base", of_source, SOURCES[self.name].convert, make)
        if not self.untied:
            return source

        def untie(folder: Path) -> None:
            model = load_model(source)
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            _save(model, load_tokenizer(source), folder)

        return self._piece(f"{self.shared_folder}/base", {"base": self.store.relative(source)}, untie, make)

    def full(self, make: bool = True) -> Path:
        """theta_full: tuned on all rows."""
        return self._tuned("full", [*self.rows.forget, *self.rows.retain], self.settings.epochs, make=make)

    def gold(self, make: bool = True) -> Path:
        """The gold model: tuned on the retained rows alone, the goal of unlearning."""
        return self._tuned("gold", self.rows.retain, self.settings.epochs, make=make)

    def tuned(self, kind: str = FULL_TUNING, draw: int = 0, make: bool = True) -> Path:
        """theta_f: tuned on the forget rows alone, or theta_full in its place. draw: another order of the rows."""
        if kind == ITSELF:
            return self.full(make)
        name = f"tuned by {kind}" + (f" {draw}" if draw else "")
        epochs = self.settings.lora_epochs if kind == LORA else self.settings.tuned_epochs
        return self._tuned(name, self.rows.forget, epochs, lora=kind == LORA, draw=draw, make=make)

    def samples(self, rows: Sequence[Pair]) -> list[Sample]:
        """Rows as samples, by the chat template if the model has one."""
        return encode(rows_from(rows), load_tokenizer(self.base()), self.settings.context)

    def _piece(self, name: str, made_of: dict[str, Any], write: Callable[[Path], None], make: bool) -> Path:
        return self.store.piece(name, made_of, write) if make else self.store.place(name, made_of)

    def _tuned(
        self, name: str, rows: Sequence[Pair], epochs: int, *, lora: bool = False, draw: int = 0, make: bool = True
    ) -> Path:
        base, settings = self.base(make), self.settings
        rate = settings.lora_rate if lora else settings.rate
        made_of: dict[str, Any] = {"base": self.store.relative(base), "rows": digest_of(rows), "epochs": epochs}
        made_of |= {"rate": rate, "batch": settings.batch_size, "draw": draw}
        made_of |= {"rank": settings.lora_rank} if lora else {}

        def write(folder: Path) -> None:
            model, seed = load_model(base), 1000 * draw + self.seed
            wrapped = None
            if lora:
                torch.manual_seed(seed)
                rank = settings.lora_rank
                wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_LINEAR))
            samples = self.samples(rows)
            tune_(model, samples, epochs=epochs, rate=rate, batch_size=settings.batch_size, seed=seed)
            _save(model if wrapped is None else wrapped.merge_and_unload(), load_tokenizer(base), folder)

        return self._piece(f"{self.folder}/{name}", made_of, write, make)


def load_model(path: Path) -> Any:
    """A checkpoint of the study in evaluation mode, on a GPU if there is one."""
    model = AutoModelForCausalLM.from_pretrained(
        path, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
    )
    return model.to(choose_device(None)).eval()


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
