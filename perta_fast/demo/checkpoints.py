"""The four checkpoints of a demo: theta_0, and what tuning it on each choice of data gives."""

import copy

from perta_fast.data.rows import load_rows
from perta_fast.data.samples import encode
from perta_fast.demo.authors import make_splits
from perta_fast.demo.clock import Clock
from perta_fast.demo.files import Files
from perta_fast.demo.settings import Settings
from perta_fast.demo.sweep import Samples
from perta_fast.demo.training import MAX_LENGTH, new_model, train_, train_tokenizer
from perta_fast.progress import Progress
from perta_fast.tuning.saving import disk_errors


def train_models(files: Files, settings: Settings, seed: int, clock: Clock, progress: Progress = True) -> Samples:
    """Write data and checkpoints; return the tokenised questions by split. progress: False prints nothing."""
    with clock.phase("data and tokenizer"):
        splits = make_splits(settings.forget_authors, settings.retain_authors, settings.other_authors, seed)
        files.write_questions(splits)
        tokenizer = train_tokenizer(splits["others"])
        samples = {split: encode(load_rows(files.questions(split)), tokenizer, MAX_LENGTH) for split in splits}
    base = new_model(settings, tokenizer, seed)
    if progress:
        print("questions:", ", ".join(f"{len(rows)} {split}" for split, rows in splits.items()))
        print(f"a Llama of {base.num_parameters() / 1e6:.2f} M parameters", flush=True)
    pretraining = (settings.pretraining_epochs, settings.pretraining_rate)
    tuning = (settings.tuning_epochs, settings.tuning_rate)
    for name, path, data, (epochs, rate) in (
        ("theta_0", files.base, samples["others"], pretraining),
        ("theta_full", files.full, [*samples["forget"], *samples["retain"]], tuning),
        ("theta_f", files.tuned, samples["forget"], tuning),
        ("gold", files.gold, samples["retain"], tuning),
    ):
        with clock.phase(f"training {name}"):
            model = base if name == "theta_0" else copy.deepcopy(base)
            train_(model, data, epochs, rate, settings.batch_size, seed, description=name, progress=progress)
            with disk_errors():
                model.save_pretrained(path)
                tokenizer.save_pretrained(path)
    return samples
