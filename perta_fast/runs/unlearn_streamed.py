"""``unlearn`` layer by layer: importance, subtraction and writing in one walk."""

import os
from dataclasses import asdict
from pathlib import Path

import torch

from perta_fast.importance.store import as_strings
from perta_fast.records.report import Report
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.settings import threads_for
from perta_fast.runs.unlearn_inputs import Loaded
from perta_fast.streaming.streamed_run import StreamedRun, StreamSettings


def unlearn_streamed(loaded: Loaded) -> Report:
    """Walk through the model, and write each part of it once its importances are there."""
    opened, how = loaded.opened, loaded.how
    options, settings, ranks = opened.options, opened.settings, opened.ranks
    assert how.skeleton is not None
    kept = options.save_importance
    loaded.schedule = how.schedule(
        loaded.samples.values(),
        settings.destination,
        subtract=True,
        kept=0 if kept is None else options.kept_form.width,
        kept_at=None if kept is None else Path(kept),
        threads=threads_for(options.threads, ranks),
    )
    walk = StreamSettings(
        subject=how.subject.origin,
        device=loaded.device,
        dtype=loaded.dtype,
        schedule=asdict(loaded.schedule),
        torch_threads=torch.get_num_threads(),
        metadata={
            role: as_strings(loaded.how_for(role).describe(samples, loaded.hashes[role]))
            for role, samples in loaded.samples.items()
        },
        save="" if kept is None else os.path.realpath(kept),
        save_as=options.kept_form.name,
        importance_dtype=options.kept_form.dtype,
        overwrite_saved=options.overwrite,
        ranks=ranks.world,
    )
    run = StreamedRun(how.skeleton, loaded.samples, ranks.share(walk), ranks)
    return apply_sources(
        run.cover(opened.sources), opened.rule, settings, annotate=loaded.annotate, streamed=run, ranks=ranks
    )
