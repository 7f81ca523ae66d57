"""The whole job: importance on forget and retain data, then the subtraction."""

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from perta_fast.application import apply_sources, open_sources
from perta_fast.data import load_records
from perta_fast.errors import InputError
from perta_fast.hashing import hash_file
from perta_fast.output import check_output
from perta_fast.report import Report
from perta_fast.rules import Rule

if TYPE_CHECKING:
    import torch


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
    out: str | Path,
    overwrite: bool = False,
    save_importance: str | Path | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    threads: int | None = None,
    progress: bool = True,
) -> Report:
    """Unlearn ``forget`` from a checkpoint (PerTA, arXiv 2601.22030) and write the result to ``out``.

    forget, retain: JSON lines files; needed by every rule but ``tv``. at: the gradients are taken at ``base``
    (the paper's choice) or at ``model``. save_importance: directory to keep the two importances in, as
    ``forget`` and ``retain``; without it they live in a temporary directory beside ``out`` and are removed.
    Other arguments as in ``apply`` and ``estimate_importance``.

    Everything is checked before the first gradient. Returns the report, also in ``out``. Raises InputError for
    bad input, RunError if the run fails; either way nothing is left behind but a finished ``save_importance``.
    Disk: the output and, while it runs, 8 bytes a parameter.
    """
    chosen = Rule.of(rule, lam, p, alpha, threshold)
    if at not in ("base", "model"):
        raise InputError(f"at is {at!r}; it must be base or model")
    place = Path(out).absolute()
    inputs = [Path(model), Path(base), Path(tuned)]
    open_sources(Rule.of("tv", lam), model, base, tuned, None, None)
    check_output(place, overwrite=overwrite, inputs=inputs)
    if chosen.estimator is None:
        return apply_sources(
            open_sources(chosen, model, base, tuned, None, None),
            chosen,
            out,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    from perta_fast.importance.estimate import estimate_on, load_subject

    data = _check_data(chosen, forget, retain)
    records = {role: load_records(path) for role, path in data.items()}
    if save_importance is not None:
        check_output(Path(save_importance).absolute(), overwrite=overwrite, inputs=[*inputs, place])
    phases: dict[str, float] = {}
    with ExitStack() as stack:
        directory = _temporary_directory(stack, place) if save_importance is None else Path(save_importance)
        counts = {}
        started = time.perf_counter()
        subject = load_subject(Path(model if at == "model" else base), device, dtype)
        phases["load"] = time.perf_counter() - started
        for role, path in data.items():
            started = time.perf_counter()
            found = estimate_on(
                subject,
                path,
                records[role],
                chosen.estimator,
                batch_size=batch_size,
                max_length=max_length,
                out=directory / role,
                overwrite=overwrite,
                progress=progress,
                description=f"{role} importance",
            ).metadata
            counts[role] = {"samples": found.sample_count, "truncated": found.truncated_count}
            phases[f"{role} importance"] = time.perf_counter() - started
        del subject  # the subtraction needs its memory for the page cache
        sources = open_sources(chosen, model, base, tuned, directory / "forget", directory / "retain")

        def annotate(report: Report) -> None:
            for name, seconds in phases.items():
                report.add_phase(name, seconds, 0)
            for role, path in data.items():
                report.data[role] = {
                    "path": str(path.resolve()),
                    "blake3": hash_file(path),
                    **counts[role],
                }
                if counts[role]["truncated"]:
                    report.warnings.append(
                        f"{counts[role]['truncated']} of {counts[role]['samples']} {role} samples were "
                        "cut to the length limit"
                    )
            if save_importance is None:
                for role in ("forget_importance", "retain_importance"):
                    report.inputs[role]["kept"] = False

        return apply_sources(
            sources,
            chosen,
            out,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
            annotate=annotate,
        )


def _check_data(rule: Rule, forget: str | Path | None, retain: str | Path | None) -> dict[str, Path]:
    data = {}
    for role, given in (("forget", forget), ("retain", retain)):
        if given is None:
            raise InputError(f"rule {rule.name} needs {role} data: a JSON lines file")
        data[role] = Path(given)
    return data


def _temporary_directory(stack: ExitStack, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.perta-importance-"
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent)))
