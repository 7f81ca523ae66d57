"""``merge``: an adapter and its base as one checkpoint. It is the subtraction with θ_full = θ_0 and λ = -1."""

from pathlib import Path
from typing import TYPE_CHECKING

from perta_fast.checkpoints.adapters import Adapter, is_adapter
from perta_fast.checkpoints.advice import resize_command
from perta_fast.checkpoints.tied import RESIZED, has_vocabulary_rows
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError
from perta_fast.files.hub import local_model
from perta_fast.progress import Progress
from perta_fast.records.declared import checked_arguments
from perta_fast.records.report import Report
from perta_fast.records.versions import now
from perta_fast.rules import Rule
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.settings import Settings, destination
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.matching import COMPLEX

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_RULE = Rule.of("tv", -1.0)


@checked_arguments
def merge(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    download: bool = False,
    overwrite: bool = False,
    link_unchanged: bool = False,
    drop_cache: bool | None = None,
    threads: int | None = None,
    allow_zero: bool = False,
    progress: Progress = True,
    group: "ProcessGroup | None" = None,
) -> Report:
    """Write ``base`` with the adapter ``tuned`` in its weights, as a checkpoint with the types and shards of ``base``.

    base, tuned, download: as for ``apply``; tuned is an adapter of any kind that ``apply`` takes. out: directory to
    make; it appears only when complete, with config, tokenizer, ``perta_report.json`` and a section in its model card.
    allow_zero: go on even if the adapter changes nothing, and make a copy. The rest is as for ``apply``.

    Each sum is computed in float32 and rounded once to the type of ``base``. Returns the report that was written.
    Raises as ``apply`` does; ``resume`` finishes a run that was stopped. Memory: 3 to 6 MiB a thread, and the largest
    adapted module in float32 if peft has to merge it.
    """
    started, ranks = now(), Ranks.of(group)
    with ranks.together("the opening of the inputs"):
        base, tuned = local_model(base, download), local_model(tuned, download)
        final = destination(base, out, False, ranks)
        if not is_adapter(tuned):
            raise InputError(f"{tuned}: is no adapter, so there is nothing to merge; give what peft saved")
        sources = _open(base, tuned)
    settings = Settings(
        final,
        started,
        overwrite=overwrite,
        link_unchanged=link_unchanged,
        drop_cache=drop_cache,
        threads=threads,
        allow_zero=allow_zero,
        progress=progress,
    )
    return apply_sources(sources, _RULE, settings, merging=True, ranks=ranks)


def _open(base: Path, tuned: Path) -> Sources:
    """The inputs. Raises InputError with advice for a merge, which has no options for rows or tensors."""
    try:
        return Sources.open(base, base, tuned)
    except InputError as error:
        text = f"{error}"
        if RESIZED in text:
            changed = Adapter.open(tuned, base).whole.items()
            rows = {entry.shape[0] for name, entry in changed if has_vocabulary_rows(name)}
            advice = (
                f"Give ‹base› with as many rows as the adapter has, made with: {resize_command(base, *rows)}"
                if len(rows) == 1
                else "Give the base as many rows (resize_token_embeddings), and merge it with peft (merge_and_unload)"
            )
            advice = f"the vocabulary was resized. {advice}"
            raise InputError(text.replace(RESIZED, advice)) from error
        if COMPLEX in text:
            raise InputError(text.replace(COMPLEX, "there is no arithmetic for complex numbers here")) from error
        raise
