"""Inputs that someone else changes while a run reads them, found by their sizes and times of change."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perta_fast.checkpoints.fingerprint import changed_meanwhile, check_as_opened
from perta_fast.distributed.ranks import is_shared
from perta_fast.errors import PertaError, RankLost, RunError
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.job import Job


def changed_input(job: Job, sources: Sources, *, changing: bool = False) -> Path | None:
    """The first weight file, or adapter's config, that is not what it was when it was opened; None if all are.

    changing: whether the run has begun to change its model, which is then left out.
    """
    for role, checkpoint in sources.named().items():
        changed = None if changing and job.changes(role) else checkpoint.changed_shard
        if changed is not None:
            return changed
    config = sources.adapter_config
    if config is not None and not _is_as_before(config, job.files["tuned"][config.name]["mtime_ns"]):
        return config
    return None


def check_unchanged(job: Job, sources: Sources, *, changing: bool = False, advice: str = "") -> None:
    """Raise RunError, with ``advice``, if an input has changed; see ``changed_input``."""
    path = changed_input(job, sources, changing=changing)
    if path is not None:
        raise RunError(f"{path}: has changed during the run{advice and f'; {advice}'}")


@contextmanager
def unchanged_inputs(job: Job, sources: Sources, *, changing: bool = False, advice: str = "") -> Iterator[None]:
    """``check_unchanged`` after a block that reads the inputs, or after its error, which a change may explain."""
    try:
        yield
    except RankLost:
        raise
    except PertaError as error:
        if is_shared(error):  # the first rank explains it
            raise
        check_unchanged(job, sources, changing=changing, advice=advice)
        raise
    check_unchanged(job, sources, changing=changing, advice=advice)


def check_sources_as_opened(sources: Sources) -> None:
    """Raise RunError if a weight file, or the settings of an adapter, have changed since they were opened."""
    check_as_opened(sources.named().values())
    if sources.adapter is not None:
        adapter = sources.adapter.adapter
        if adapter.config_has_changed:
            raise changed_meanwhile(adapter.config)


def _is_as_before(path: Path, mtime_ns: int) -> bool:
    try:
        return path.stat().st_mtime_ns == mtime_ns
    except OSError:
        return False
