"""The subtraction over files: theta - lam * w * (theta_f - theta_0), chunk by chunk, into a new checkpoint.

Inputs are mapped and every byte is read once; the output is written once, with the shard layout of the model.
Memory is one chunk a thread, whatever the size of a tensor. Torch is not imported.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from perta_fast import compiled
from perta_fast.agreement import TensorPlan, plan_tensors
from perta_fast.checkpoint import OTHER_WEIGHTS, PICKLED, Checkpoint
from perta_fast.dtypes import ITEM_SIZES, KERNEL_CODES
from perta_fast.errors import InputError, RunError
from perta_fast.hashing import hash_files
from perta_fast.importance.store import STEM, Importance, read_metadata
from perta_fast.memory import PeakMemory
from perta_fast.model_card import write_model_card
from perta_fast.output import OutputDirectory, check_space, write_fully
from perta_fast.progress import byte_bar
from perta_fast.report import (
    Report,
    TensorReport,
    describe_files,
    installed_versions,
    now,
)
from perta_fast.rules import Rule
from perta_fast.safetensors_file import TensorEntry

CHUNK = 1 << 19  # elements: two to four MiB of output a thread
_FREE_MARGIN = 64 << 20  # bytes of disk left for small files


@dataclass(frozen=True)
class Sources:
    """The opened inputs of an application, and which tensor meets which."""

    model: Checkpoint
    base: Checkpoint
    tuned: Checkpoint
    forget_importance: Checkpoint | None
    retain_importance: Checkpoint | None
    plans: list[TensorPlan]
    metadata: dict[str, dict[str, str]]

    def named(self) -> dict[str, Checkpoint]:
        """The inputs by the names they have in the report."""
        everything = {
            "model": self.model,
            "base": self.base,
            "tuned": self.tuned,
            "forget_importance": self.forget_importance,
            "retain_importance": self.retain_importance,
        }
        return {name: checkpoint for name, checkpoint in everything.items() if checkpoint is not None}

    def operands(self, plan: TensorPlan) -> Iterator[tuple[Checkpoint, TensorEntry]]:
        """Checkpoint and place of each array of a tensor, in the kernel's order."""
        pairs = (
            (self.model, plan.theta),
            (self.tuned, plan.tuned),
            (self.base, plan.base),
            (self.forget_importance, plan.forget_importance),
            (self.retain_importance, plan.retain_importance),
        )
        for checkpoint, entry in pairs:
            if checkpoint is not None and entry is not None:
                yield checkpoint, entry


def apply(
    model: str | Path,
    base: str | Path,
    tuned: str | Path,
    forget_importance: "str | Path | Importance | None" = None,
    retain_importance: "str | Path | Importance | None" = None,
    *,
    rule: str = "fisher",
    lam: float = 1.0,
    p: float | None = None,
    alpha: float = 1.0,
    threshold: float | None = None,
    out: str | Path,
    overwrite: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> Report:
    """Write theta_full - lam * w * (theta_f - theta_0) as a new checkpoint (PerTA, arXiv 2601.22030).

    model, base, tuned: directories with safetensors weights that agree in tensor names and shapes.
    forget_importance, retain_importance: what ``estimate_importance`` saved (or returned with ``out``); both
    needed by every rule but ``tv``, which takes none. rule, lam, p, alpha, threshold: see ``rules.Rule``.
    out: directory to make; it appears only when complete, with config, tokenizer, ``perta_report.json`` and a
    section in its model card. overwrite: replace a non-empty ``out``. threads: None takes all processors.

    Returns the report that was written. Raises InputError for bad input (nothing is written), RunError if the
    run fails (nothing is left behind). Memory: about 4 MiB a thread, beside mapped pages of files.
    """
    chosen = Rule.of(rule, lam, p, alpha, threshold)
    sources = open_sources(
        chosen, model, base, tuned, _directory_of(forget_importance), _directory_of(retain_importance)
    )
    return apply_sources(sources, chosen, out, overwrite=overwrite, threads=threads, progress=progress)


def open_sources(
    rule: Rule,
    model: str | Path,
    base: str | Path,
    tuned: str | Path,
    forget_importance: Path | None,
    retain_importance: Path | None,
) -> Sources:
    """Open and match all inputs; raise InputError naming what is wrong with them."""
    opened = [Checkpoint.open(path) for path in (model, base, tuned)]
    importances: list[Checkpoint | None] = [None, None]
    metadata = {}
    if rule.estimator is not None:
        for k, (role, path) in enumerate(
            {"forget_importance": forget_importance, "retain_importance": retain_importance}.items()
        ):
            if path is None:
                raise InputError(f"rule {rule.name} needs {role}; estimate it with: perta importance")
            importances[k] = checkpoint = Checkpoint.open(path, STEM)
            metadata[role] = found = read_metadata(checkpoint)
            if found["estimator"] != rule.estimator:
                raise InputError(
                    f"{path}: holds estimator {found['estimator']}, rule {rule.name} needs {rule.estimator}"
                )
    elif forget_importance is not None or retain_importance is not None:
        raise InputError("rule tv takes no importance; leave it out or choose another rule")
    plans = plan_tensors(opened[0], opened[1], opened[2], importances[0], importances[1])
    return Sources(opened[0], opened[1], opened[2], importances[0], importances[1], plans, metadata)


def apply_sources(
    sources: Sources,
    rule: Rule,
    out: str | Path,
    *,
    overwrite: bool,
    threads: int | None,
    progress: bool,
    annotate: Callable[[Report], None] | None = None,
) -> Report:
    """``apply`` on opened inputs; ``annotate`` may add to the report before it is written."""
    check_threads(threads)
    threads = threads or compiled.kernels().available_threads()
    report = Report(
        rule=rule.name,
        lam=rule.lam,
        p=rule.p,
        alpha=rule.alpha,
        threshold=rule.threshold,
        inputs={},
        importance=sources.metadata,
        threads=threads,
        instruction_set=compiled.kernels().build_info()["instruction_set"],
        warnings=_metadata_warnings(sources.metadata),
        versions=installed_versions(),
        started=now(),
    )
    inputs = [path for each in sources.named().values() for path in (each.path, *each.files())]
    target = OutputDirectory(out, overwrite=overwrite, inputs=inputs)
    check_space(target.final, sources.model.size + _FREE_MARGIN)
    with PeakMemory() as memory, target:
        copy_companions(sources.model, target.path)
        _write_shards(sources, rule, target.path, report, progress)
        _seal(sources, target, report, progress)
        if annotate is not None:
            annotate(report)
        write_model_card(target.path, report)
        report.memory = memory.as_dict()
        report.finished = now()
        report.save(target.path)
        target.commit()
    return report


def check_threads(threads: int | None) -> None:
    """Raise InputError unless ``threads`` is None or at least 1."""
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1")


def copy_companions(source: Checkpoint, target: Path) -> None:
    """Copy everything beside the weights: config, tokenizer, generation config, code, and the index in use."""
    for path in sorted(source.path.iterdir()):
        weights = path.name.removesuffix(".index.json").endswith((".safetensors", *PICKLED, *OTHER_WEIGHTS))
        if path.is_file() and (path == source.index or not weights):
            shutil.copyfile(path, target / path.name)


@dataclass
class _Totals:
    """What the chunks of one tensor add up to."""

    sums: dict[str, float] = field(default_factory=dict)

    def add(self, statistics: dict[str, float]) -> None:
        for key, value in statistics.items():
            self.sums[key] = self.sums.get(key, 0) + value


def _write_shards(sources: Sources, rule: Rule, directory: Path, report: Report, progress: bool) -> None:
    descriptors: dict[Path, int] = {}
    totals = [_Totals() for _ in sources.plans]
    moved = sum(_bytes_moved(plan, plan.theta.count) for plan in sources.plans)
    started = time.perf_counter()
    try:
        for name, shard in sources.model.shards.items():
            descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            descriptors[shard.path] = descriptor
            write_fully(descriptor, memoryview(shard.header), 0)
        with byte_bar(moved, "apply", progress) as bar:
            _run_chunks(sources, rule, descriptors, totals, report.threads, bar.update)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    report.add_phase("apply", time.perf_counter() - started, moved)
    report.tensors = [
        _tensor_report(plan, total.sums) for plan, total in zip(sources.plans, totals, strict=True)
    ]
    for row in report.tensors:
        report.counts[row.action] = report.counts.get(row.action, 0) + 1


def _run_chunks(
    sources: Sources,
    rule: Rule,
    descriptors: dict[Path, int],
    totals: list[_Totals],
    threads: int,
    advance: Callable[[int], Any],
) -> None:
    """Deal the chunks to the threads in file order; the first error stops all of them."""
    chunks = _chunks(sources.plans)
    lock = threading.Lock()
    failed = threading.Event()

    def work() -> None:
        buffer = np.empty(CHUNK * 4, dtype=np.uint8)
        try:
            while not failed.is_set():
                with lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                index, begin, count = chunk
                plan = sources.plans[index]
                statistics = _process(sources, rule, plan, begin, count, descriptors, buffer)
                with lock:
                    totals[index].add(statistics)
                    advance(_bytes_moved(plan, count))
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work) for _ in range(threads)]
        try:
            for future in futures:
                future.result()
        except BaseException:  # an interrupt reaches only this thread
            failed.set()
            raise


def _chunks(plans: list[TensorPlan]) -> Iterator[tuple[int, int, int]]:
    for index, plan in enumerate(plans):
        for begin in range(0, plan.theta.count, CHUNK):
            yield index, begin, min(CHUNK, plan.theta.count - begin)


def _process(
    sources: Sources,
    rule: Rule,
    plan: TensorPlan,
    begin: int,
    count: int,
    descriptors: dict[Path, int],
    buffer: "np.ndarray[Any, np.dtype[np.uint8]]",
) -> dict[str, float]:
    """Compute or copy one chunk and write it; return its statistics."""
    item = ITEM_SIZES[plan.theta.dtype]
    offset, size = plan.theta.begin + begin * item, count * item
    file = sources.model.file_of(plan.theta)
    statistics: dict[str, float] = {}
    if plan.copied is None:
        statistics = subtract_chunk(sources, rule, plan, begin, count, int(buffer.ctypes.data))
        _check_finite(plan, statistics)
        data = buffer.data[:size]
    else:
        data = file.data.data[offset : offset + size]
    write_fully(descriptors[plan.theta.path], data, offset)
    for checkpoint, entry in sources.operands(plan):
        width = ITEM_SIZES[entry.dtype]
        checkpoint.file_of(entry).release(entry.begin + begin * width, entry.begin + (begin + count) * width)
    return statistics


def subtract_chunk(
    sources: Sources, rule: Rule, plan: TensorPlan, begin: int, count: int, out: int
) -> dict[str, float]:
    """Run the kernel on ``count`` elements of a tensor from ``begin`` on, into memory at address ``out``."""
    addresses, codes = [], []
    for checkpoint, entry in sources.operands(plan):
        place = entry.begin + begin * ITEM_SIZES[entry.dtype]
        addresses.append(checkpoint.file_of(entry).address + place)
        codes.append(KERNEL_CODES[entry.dtype])
    missing = 5 - len(addresses)  # rule tv has no importances
    result: dict[str, float] = compiled.kernels().rescaled_subtract(
        out,
        *addresses,
        *[0] * missing,
        tuple(codes + [0] * missing),
        count,
        rule.lam,
        rule.p,
        rule.alpha,
        rule.threshold,
        1,
        True,
    )
    return result


def _check_finite(plan: TensorPlan, statistics: dict[str, float]) -> None:
    for key, entry in (
        ("nonfinite_forget", plan.forget_importance),
        ("nonfinite_retain", plan.retain_importance),
    ):
        if entry is not None and statistics[key]:
            raise InputError(
                f"{entry.path}: tensor {entry.name} has NaN or infinite importance; estimate it again, "
                "in float32 or bfloat16 if the model ran in float16"
            )
    if statistics["nonfinite_out"]:
        raise RunError(
            f"tensor {plan.theta.name}: the result would hold NaN or infinite values; look at this tensor in "
            "model, base and tuned, or use a smaller lambda. Nothing was written"
        )


def _bytes_moved(plan: TensorPlan, count: int) -> int:
    theta = ITEM_SIZES[plan.theta.dtype]
    others = (plan.tuned, plan.base, plan.forget_importance, plan.retain_importance)
    read = sum(ITEM_SIZES[entry.dtype] for entry in others if entry is not None)
    return count * (2 * theta + read)


def _tensor_report(plan: TensorPlan, sums: dict[str, float]) -> TensorReport:
    row = TensorReport(plan.theta.name, plan.theta.dtype, list(plan.theta.shape), "subtracted")
    if plan.copied is not None:
        row.action = f"copied: {plan.copied}"
    elif not sums.get("nonzero_task"):
        row.action = "copied: task vector is zero"
    if sums and plan.theta.count:
        row.mean_weight = sums["sum_weight"] / plan.theta.count
        row.changed = int(sums["changed"])
        norm, change = sums["sum_squared_theta"] ** 0.5, sums["sum_squared_change"] ** 0.5
        if np.isfinite(norm) and np.isfinite(change):
            row.relative_change = change / norm if norm else (0.0 if change == 0 else None)
    return row


def _seal(sources: Sources, target: OutputDirectory, report: Report, progress: bool) -> None:
    """Flush the new shards to the disk and, meanwhile, hash inputs and output."""
    outputs = [target.path / name for name in sources.model.shards]
    by_role = {role: list(checkpoint.files()) for role, checkpoint in sources.named().items()}
    config = sources.model.path / "config.json"
    if config.exists():
        by_role["model"].append(config)
    everything = [path for paths in by_role.values() for path in paths] + outputs
    total = sum(path.stat().st_size for path in dict.fromkeys(everything))
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as pool, byte_bar(total, "hash and sync", progress) as bar:
        synced = pool.submit(_sync_files, outputs)
        hashes = hash_files(everything, report.threads, bar.update)
        synced.result()
    report.add_phase("hash and sync", time.perf_counter() - started, total)
    report.inputs = {
        role: describe_files({path: hashes[path] for path in paths}, paths[0].parent)
        for role, paths in by_role.items()
    }
    report.output = describe_files({path: hashes[path] for path in outputs}, target.path)
    report.output["path"] = str(target.final)


def _sync_files(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _metadata_warnings(metadata: dict[str, dict[str, str]]) -> list[str]:
    if len(metadata) < 2:
        return []
    forget, retain = metadata["forget_importance"], metadata["retain_importance"]
    warnings = []
    if forget["data_hash"] == retain["data_hash"]:
        warnings.append("forget and retain importance were estimated on the same data")
    if forget["evaluated_at"] != retain["evaluated_at"]:
        warnings.append(
            f"forget importance was evaluated at {forget['evaluated_at']}, "
            f"retain importance at {retain['evaluated_at']}"
        )
    slow = forget.get("one_by_one") or retain.get("one_by_one")
    if slow:
        warnings.append(f"no batched rule fits these parameters, which took a pass for each sample: {slow}")
    return warnings


def _directory_of(importance: "str | Path | Importance | None") -> Path | None:
    if importance is None or isinstance(importance, str | Path):
        return None if importance is None else Path(importance)
    if importance.directory is None:
        raise InputError("this importance lives in memory only; save it first: importance.save(directory)")
    return importance.directory
