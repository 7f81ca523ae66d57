"""The whole job: importance on forget and retain data, then the subtraction."""

import os
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from perta_fast.data.json_lines import read_data
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError
from perta_fast.files.new_directory import OutputDirectory, check_output, check_space
from perta_fast.progress import Progress
from perta_fast.records.recipe import as_recipe
from perta_fast.records.report import DataRecord, Report
from perta_fast.rules import Rule
from perta_fast.runs.apply import apply_sources
from perta_fast.runs.settings import (
    Settings,
    check_threads,
    destination,
    threads_for,
    unfinished_advice,
)
from perta_fast.subtraction.in_place import is_open
from perta_fast.subtraction.inputs import Sources, open_importances
from perta_fast.subtraction.unfinished import begun_job, has_begun

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from perta_fast.streaming.schedule import Schedule


def unlearn(
    model: str | Path,
    base: str | Path,
    tuned: str | Path,
    forget: str | Path | None = None,
    retain: str | Path | None = None,
    *,
    rule: str = "fisher",
    lam: float = 1.0,
    p: float | None = None,
    alpha: float = 1.0,
    threshold: float | None = None,
    at: Literal["base", "model"] = "base",
    out: str | Path | None = None,
    in_place: bool = False,
    overwrite: bool = False,
    link_unchanged: bool = False,
    drop_cache: bool | None = None,
    save_importance: str | Path | None = None,
    stream: bool = False,
    memory: int | None = None,
    device_memory: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    threads: int | None = None,
    progress: Progress = True,
    group: "ProcessGroup | None" = None,
) -> Report:
    """Unlearn ``forget`` from a checkpoint (PerTA, arXiv 2601.22030), to ``out`` or in place.

    forget, retain: JSON lines files; needed by every rule but ``tv``, which has no use for them and only puts
    their hashes and counts in the report. Each is read once, so a pipe will do. at: the gradients are taken at
    ``base`` (the paper's choice) or at ``model``. save_importance: directory to keep the two importances in, as
    ``forget`` and ``retain``; without it they live in a temporary directory beside the result and are removed.
    stream: walk through the model with one decoder layer in memory at a time, and weigh, subtract and write
    each on the way. memory, device_memory: bytes that this may take; None sets no limit. Other arguments as in
    ``apply`` and ``estimate_importance``.

    Everything is checked before the first gradient. Returns the report, also in ``out``. Raises InputError for
    bad input, RunError if the run fails, ``errors.Interrupted`` if it is stopped with work that ``resume`` can
    take up again; otherwise nothing is left behind but a finished ``save_importance``.
    Disk: the output and, while it runs, 8 bytes a parameter; with ``stream`` hidden states instead (in place,
    both).
    """
    recipe = as_recipe(locals())  # the arguments, as nothing else is there yet
    ranks = Ranks.of(group)
    with ranks.together("the opening of the inputs"):
        chosen = Rule.of(rule, lam, p, alpha, threshold)
        if at not in ("base", "model"):
            raise InputError(f"at is {at!r}; it must be base or model")
        check_threads(threads)
        if stream and link_unchanged and not in_place:
            raise InputError("stream writes every shard as it goes; leave link_unchanged out")
        place = destination(model, out, in_place, ranks)
        inputs = [Path(each) for each in (model, base, tuned, forget, retain) if each is not None]
        opened = Sources.open(model, base, tuned)
        if not in_place:
            check_output(place, overwrite=overwrite, inputs=inputs)
        if chosen.estimator is None and save_importance is not None:
            raise InputError("rule tv takes no importance, so there is none to save; leave save_importance out")
        named = _read_named(forget, retain) if chosen.estimator is None else {}
    settings = Settings(place, in_place, overwrite, link_unchanged, drop_cache, threads, progress)
    if chosen.estimator is None:

        def note(report: Report) -> None:
            report.data, report.recipe = named, recipe

        return apply_sources(opened, chosen, settings, annotate=note, ranks=ranks)
    with ranks.together("the loading of model and data"):
        if not overwrite and not in_place and has_begun(place) and not (stream and begun_job(place).stream):
            raise InputError(unfinished_advice(place))
        from perta_fast.models.loading import check_sizes, load_subject, samples_for
        from perta_fast.runs.estimate import describe, estimate_on, open_skeleton

        check_sizes(batch_size, max_length)
        data = _check_data(chosen, forget, retain)
        records, hashes = {}, {}
        for role, path in data.items():
            records[role], hashes[role] = read_data(path)
        streamed = stream and not in_place  # how much disk it takes, planning knows from the samples
        if save_importance is None and not streamed:
            covered = sum(match.theta.count for match in opened.matches if match.copied is None)
            check_space(place, (0 if in_place else opened.model.size) + 8 * covered)
        elif save_importance is not None:
            kept = Path(os.path.realpath(save_importance))
            check_output(kept, overwrite=overwrite, inputs=[*inputs, place])
            if not in_place:
                check_output(place, overwrite=overwrite, inputs=[kept])
        started = time.perf_counter()
        evaluated = Path(model if at == "model" else base)
        skeleton = open_skeleton(evaluated, device, dtype) if stream else None
        structure = None if skeleton is None else skeleton.model
        subject = load_subject(evaluated, device, dtype, structure=structure)
        samples = {role: samples_for(subject, rows, max_length) for role, rows in records.items()}
        phases = {"load": time.perf_counter() - started}
        device_used = str(subject.device if skeleton is None else skeleton.device)
    with ranks.together("the data"):
        if any(each != hashes for each in ranks.gather(hashes)):
            raise InputError("not all processes see the same data files")
    data_records: dict[str, DataRecord] = {
        role: {
            "path": str(path.resolve()),
            "blake3": hashes[role],
            "samples": len(samples[role]),
            "truncated": sum(each.truncated for each in samples[role]),
        }
        for role, path in data.items()
    }

    schedule: Schedule | None = None

    def annotate(report: Report) -> None:
        for name, seconds in phases.items():
            report.add_phase(name, seconds, 0)
        report.data, report.recipe = data_records, recipe
        report.settings = {
            "at": at,
            "estimator": str(chosen.estimator),
            "batch_size": str(batch_size),
            "max_length": "the model's" if max_length is None else str(max_length),
            "dtype": "the checkpoint's" if dtype is None else str(dtype).removeprefix("torch."),
            "device": device_used,
            "stream": str(schedule or ("yes" if stream else "no")),
            "processes": str(ranks.world),
        }
        for role, record in data_records.items():
            if record["truncated"]:
                report.warn(
                    f"{record['truncated']} of {record['samples']} {role} samples were cut to the length limit"
                )

    if streamed:
        import torch

        from perta_fast.importance.store import as_strings
        from perta_fast.streaming.forecast.choice import schedule_for
        from perta_fast.streaming.forecast.costs import Load
        from perta_fast.streaming.streamed_run import StreamedRun, StreamSettings

        assert skeleton is not None
        lengths = [[len(each.input_ids) for each in rows] for rows in samples.values()]
        load = Load(lengths, chosen.estimator == "empirical-fisher", kept=save_importance is not None)
        workers = threads_for(threads, ranks)
        schedule = schedule_for(
            skeleton, load, batch_size, place, memory, device_memory, workers, progress is True, ranks
        )
        walk_settings = StreamSettings(
            subject=subject.origin,
            device=device_used,
            dtype=str(subject.module.dtype).removeprefix("torch."),
            schedule=asdict(schedule),
            torch_threads=torch.get_num_threads(),
            metadata={
                role: as_strings(describe(subject, samples[role], hashes[role], chosen.estimator))
                for role in data
            },
            save="" if save_importance is None else str(kept),
            overwrite_saved=overwrite,
            ranks=ranks.world,
        )
        run = StreamedRun(skeleton, samples, ranks.share(walk_settings), ranks)
        return apply_sources(run.cover(opened), chosen, settings, annotate=annotate, streamed=run, ranks=ranks)
    with ExitStack() as entered:
        with ranks.together("the directory of the importances"):
            importances = _importance_directory(place, save_importance, overwrite)
            if ranks.first:
                entered.enter_context(importances)
        for role in data:
            started = time.perf_counter()
            estimate_on(
                subject,
                samples[role],
                hashes[role],
                chosen.estimator,
                batch_size=batch_size,
                memory=memory,
                device_memory=device_memory,
                out=importances.path / role,
                overwrite=False,
                progress=progress,
                description=f"{role} importance",
                skeleton=skeleton,
                ranks=ranks,
            )
            phases[f"{role} importance"] = time.perf_counter() - started
        del subject  # the subtraction needs its memory for the page cache
        with ranks.together("the importances"):
            if save_importance is not None and ranks.first:
                importances.commit()
        directory = importances.path if save_importance is None else importances.final
        with ranks.together("the importances"):
            estimated = open_importances(chosen, directory / "forget", directory / "retain")
            sources = Sources.open(model, base, tuned, estimated)
        try:
            return apply_sources(
                sources,
                chosen,
                settings,
                annotate=annotate,
                temporary=save_importance is None,
                ranks=ranks,
            )
        except BaseException:
            importances.keep = has_begun(place) or is_open(place)
            raise


def _read_named(forget: str | Path | None, retain: str | Path | None) -> dict[str, DataRecord]:
    """Records of data that the rule has no use for, but that the caller names as the run's."""
    named: dict[str, DataRecord] = {}
    for role, given in (("forget", forget), ("retain", retain)):
        if given is not None:
            records, digest = read_data(given)
            path = str(Path(given).resolve())
            named[role] = {"path": path, "blake3": digest, "samples": len(records), "truncated": 0}
    return named


def _check_data(rule: Rule, forget: str | Path | None, retain: str | Path | None) -> dict[str, Path]:
    data = {}
    for role, given in (("forget", forget), ("retain", retain)):
        if given is None:
            raise InputError(f"rule {rule.name} needs {role} data: a JSON lines file")
        data[role] = Path(given)
    return data


def _importance_directory(out: Path, kept: str | Path | None, overwrite: bool) -> OutputDirectory:
    """Where the importances go: to ``kept``, or beside ``out`` and never committed, so gone after the run."""
    if kept is not None:
        return OutputDirectory(kept, overwrite=overwrite)
    return OutputDirectory(out.with_name(f".{out.name}.perta-importance"))
