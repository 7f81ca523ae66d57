"""The four checkpoints of a demo: theta_0, and what tuning it on each choice of data gives."""

import copy
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from perta_fast.data.json_lines import load_rows
from perta_fast.data.samples import encode
from perta_fast.demo.authors import make_splits
from perta_fast.demo.clock import Clock
from perta_fast.demo.files import Files
from perta_fast.demo.settings import Settings
from perta_fast.demo.sweep import Samples
from perta_fast.demo.training import MAX_LENGTH, new_model, train_, train_tokenizer


def train_models(files: Files, settings: Settings, seed: int, clock: Clock) -> Samples:
    """Write data and checkpoints; return the tokenised questions by split."""
    with clock.phase("data and tokenizer"):
        splits = make_splits(settings.forget_authors, settings.retain_authors, settings.other_authors, seed)
        files.write_questions(splits)
        tokenizer = train_tokenizer(splits["others"])
        samples = {split: encode(load_rows(files.questions(split)), tokenizer, MAX_LENGTH) for split in splits}
    print("questions:", ", ".join(f"{len(rows)} {split}" for split, rows in splits.items()))
    base = new_model(settings, tokenizer, seed)
    print(f"a Llama of {base.num_parameters() / 1e6:.2f} M parameters", flush=True)
    with clock.phase("training theta_0"):
        train_(
            base,
            samples["others"],
            epochs=settings.pretraining_epochs,
            rate=settings.pretraining_rate,
            batch_size=settings.batch_size,
            seed=seed,
            description="theta_0",
        )
        _save(base, tokenizer, files.base)
    for name, path, data in (
        ("theta_full", files.full, [*samples["forget"], *samples["retain"]]),
        ("theta_f", files.tuned, samples["forget"]),
        ("gold", files.gold, samples["retain"]),
    ):
        with clock.phase(f"training {name}"):
            model = copy.deepcopy(base)
            train_(
                model,
                data,
                epochs=settings.tuning_epochs,
                rate=settings.tuning_rate,
                batch_size=settings.batch_size,
                seed=seed,
                description=name,
            )
            _save(model, tokenizer, path)
    return samples


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
