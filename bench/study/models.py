"""The trained models of one seed: theta_0, and theta_0 tuned on several choices of data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.study.data import Row, Split, Tofu
from bench.study.settings import Settings
from bench.study.store import Store, digest_of
from bench.study.training import new_model, tune_
from perta_fast.data.rows import rows_from
from perta_fast.data.samples import encode
from perta_fast.demo.training import train_tokenizer
from perta_fast.models.loading import choose_device

_SHAPE = ("vocabulary", "hidden_size", "layers", "heads", "context", "batch_size")


@dataclass(frozen=True)
class Models:
    """The float32 checkpoints of one seed, as pieces of ``store``."""

    tofu: Tofu
    settings: Settings
    seed: int
    store: Store

    def base(self) -> Path:
        """theta_0, and the tokenizer of all models; neither has seen a forget set."""
        settings = self.settings
        names = ("pretraining_authors", "rows_per_author", "pretraining_epochs", "pretraining_rate", *_SHAPE)
        made_of = {"seed": self.seed, "data": self.tofu.digest} | _some(settings, names)

        def make(folder: Path) -> None:
            rows = [*self.tofu.pretraining, *self.tofu.facts]
            tokenizer = train_tokenizer(map(dict, rows), settings.vocabulary)
            model = new_model(settings, tokenizer, self.seed).to(choose_device(None))
            epochs, rate = settings.pretraining_epochs, settings.pretraining_rate
            self._train(model, tokenizer, rows, epochs, rate, folder)

        return self.store.piece(f"seed{self.seed}/base", made_of, make)

    def full(self) -> Path:
        """theta_full: tuned on all authors that theta_0 has not seen, the same for every forget set.

        It and gold are tuned on the facts again, as models of this size forget them otherwise.
        """
        return self._tuned("full", [*self.tofu.tuning, *self.tofu.facts])

    def gold(self, split: Split) -> Path:
        """The gold model: tuned on the retained rows alone, the goal of unlearning."""
        return self._tuned(f"{split.name}/gold", [*split.rows["retain"], *self.tofu.facts])

    def tuned(self, split: Split) -> Path:
        """theta_f: tuned on the forget set alone."""
        return self._tuned(f"{split.name}/tuned", split.rows["forget"])

    def _tuned(self, name: str, rows: Sequence[Row]) -> Path:
        base, settings = self.base(), self.settings
        made_of = {
            "base": self.store.relative(base),
            "rows": digest_of(rows),
            **_some(settings, ("tuning_epochs", "tuning_rate", "batch_size")),
        }

        def make(folder: Path) -> None:
            epochs, rate = settings.tuning_epochs, settings.tuning_rate
            self._train(load_model(base), load_tokenizer(base), rows, epochs, rate, folder)

        return self.store.piece(f"seed{self.seed}/{name}", made_of, make)

    def _train(self, model: Any, tokenizer: Any, rows: Sequence[Row], epochs: int, rate: float, folder: Path) -> None:
        """Train on ``rows`` and save to ``folder``."""
        settings = self.settings
        samples = encode(rows_from(rows), tokenizer, settings.context)
        batch_size, seed = settings.batch_size, self.seed
        tune_(model, samples, epochs=epochs, rate=rate, batch_size=batch_size, seed=seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load_model(path: Path) -> Any:
    """A checkpoint of the study in evaluation mode, on a GPU if there is one."""
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True).to(choose_device(None)).eval()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def _some(settings: Settings, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name in names}
