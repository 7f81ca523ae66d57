"""Makes the page of a run. It reads and draws everything before it writes anything."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from perta_fast.data.formats import data_files
from perta_fast.data.forms import Fields
from perta_fast.errors import InputError, RunError
from perta_fast.files.new_directory import check_unfinished, discard_unfinished
from perta_fast.files.new_file import check_output_file, write_output_file
from perta_fast.files.own import check_own
from perta_fast.files.reading import checked_path
from perta_fast.progress import Progress
from perta_fast.records.report import Report
from perta_fast.reporting.answers import Answers, answer_own, answer_prompts, read_prompts
from perta_fast.reporting.evidence import read_curves, read_scores
from perta_fast.reporting.figures import check_matplotlib
from perta_fast.reporting.page import Evidence, compose
from perta_fast.reporting.verified import not_asked, verify_for_page
from perta_fast.reporting.weight_distribution import distribution

PathLike = str | Path


def write_report(
    run: PathLike,
    out: PathLike,
    *,
    sweeps: Sequence[PathLike] = (),
    evaluations: Sequence[PathLike] = (),
    prompts: PathLike | None = None,
    fields: Fields | None = None,
    show_text: bool = False,
    png: PathLike | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress = True,
) -> None:
    """Show what a run did, in one self-contained HTML file.

    run: output directory of ``unlearn``, ``apply`` or ``merge``. out: an .html file. sweeps: directories of ``sweep``,
    all on the same data. evaluations: files of ``evaluate``; one with forget_loss and retain_loss on that data, such as
    a gold model's, is a point beside the curves. prompts: data with questions for the model before and after; needs
    ``show_text``, as answers may be private. fields: names of its fields, as in ``unlearn``. show_text: without
    ``prompts``, ask up to three questions of the run's own data. png: directory for the plots as separate files.
    verify: hash all files again and compute a few tensors again, as ``verify`` does; the page says what was found.

    Raises InputError for bad input, and without matplotlib; RunError if a file cannot be written. ``out`` appears whole
    or not at all. Memory: a few chunks of the importances; with prompts, one model at a time.
    """
    check_matplotlib()
    run, out = Path(run), checked_path(out)
    if prompts is not None and not show_text:
        raise InputError("‹prompts› would put private answers into the page; pass ‹show_text› if it may hold them")
    report = Report.load(run)
    inputs = [*map(Path, evaluations), *_files_of(report)] + ([] if prompts is None else data_files(prompts))
    check_output_file(out, (".html", ".htm"), overwrite=overwrite, inputs=inputs)
    if png is not None:
        _check_folder(Path(png), overwrite, inputs)
    curves, scores = read_curves(sweeps), read_scores(evaluations)
    questions = None if prompts is None else read_prompts(prompts, fields)
    answers: Answers | str | None = None
    if questions is not None:
        answers = answer_prompts(report, run, questions, progress)
    elif show_text:
        answers = answer_own(report, run, progress)
    evidence = Evidence(
        report,
        run,
        verify_for_page(run, progress) if verify else not_asked(run),
        curves,
        scores,
        distribution(report, progress),
        answers,
    )
    page, plots = compose(evidence)
    if png is not None:
        discard_unfinished(Path(png))
        try:
            Path(png).mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{png}: cannot be made: {error.strerror}") from error
        for plot in plots:
            write_output_file(Path(png) / f"{plot.name}.png", plot.png, overwrite=overwrite)
    write_output_file(out, page, overwrite=overwrite)


def _files_of(report: Report) -> list[Path]:
    """The files that a run read and wrote."""
    records = [report.output, *report.inputs.values()]
    files = [Path(record["path"]) / name for record in records for name in record["files"]]
    for record in report.data.values():
        with suppress(InputError):  # it has gone
            files += data_files(record["path"]) if record["path"] else []
    return files


def _check_folder(path: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    checked_path(path)
    check_unfinished(path, overwrite=overwrite)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is not a directory; name one for the plots")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: is not a directory")
    if path.is_dir() and any(path.glob("*.png")) and not overwrite:
        raise InputError(f"{path}: holds plots already; choose another directory or pass ‹overwrite›")
    for plot in path.glob("*.png"):
        check_output_file(plot, (".png",), overwrite=overwrite, inputs=inputs)
    for beside in path.glob(".*.perta-partial"):
        check_own(beside, directory=False)
