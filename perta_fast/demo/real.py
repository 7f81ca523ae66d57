"""The whole job on a real model, SmolLM2-135M-Instruct from its Python package, by the recommended default."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from perta_fast.data.rows import load_rows
from perta_fast.data.samples import encode, prompt_of
from perta_fast.demo.authors import make_authors, questions
from perta_fast.demo.clock import Clock
from perta_fast.demo.files import Files
from perta_fast.demo.packaged import INSTALL, NEEDED, smollm2_file, write_decoded
from perta_fast.demo.scoring import score
from perta_fast.errors import InputError, printable
from perta_fast.models.greedy_answers import greedy_answers
from perta_fast.progress import Progress
from perta_fast.runs.unlearn import unlearn
from perta_fast.tuning.run import tune

_MAX_LENGTH = 128
_ASKED = {"forget": (0,), "retain": (0,), "forget_rephrased": (2,), "retain_rephrased": (2,)}  # phrasings by split
_SHOWN = 2  # answers of each data set
_ANSWER_TOKENS = 24


@dataclass(frozen=True)
class RealSettings:
    """Authors of each kind, and how theta_full and theta_f are tuned, on all parameters."""

    forget_authors: int = 1
    retain_authors: int = 3
    epochs: int = 6
    forget_epochs: int = 10
    rate: float = 1e-4
    batch_size: int = 8


def is_installed() -> bool:
    """Whether the package of the model and what reads it are there."""
    return None not in map(find_spec, NEEDED)


def write_packaged(folder: Path) -> None:
    """Write theta_0. Raises InputError, with what to install, if a package is missing."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise InputError(f"model smollm2 needs the package {missing[0]}: {INSTALL}")
    write_decoded(smollm2_file(), folder)


def save_start(files: Files, seed: int, write_base: Callable[[Path], None] | None = None) -> None:
    """Write theta_0 and the made-up questions, for a first run of one's own."""
    (write_base or write_packaged)(files.base)
    _write_questions(files, RealSettings(), seed)


def run_real(
    files: Files,
    seed: int,
    settings: RealSettings | None = None,
    write_base: Callable[[Path], None] = write_packaged,
    *,
    progress: Progress = True,
) -> None:
    """Teach the model made-up authors, unlearn some of them, and print what it says before and after."""
    settings = settings or RealSettings()
    clock = Clock()
    with clock.phase("the model from its package"):
        write_base(files.base)
    _write_questions(files, settings, seed)
    for name, role, epochs, out in (
        ("theta_full", "all", settings.epochs, files.full),
        ("theta_f", "forget", settings.forget_epochs, files.tuned),
    ):
        if progress:
            print(f"tuning {name} on the {role} questions", flush=True)
        with clock.phase(f"tuning {name}"):
            data, size = files.questions(role), settings.batch_size
            how = {"full": True, "lr": settings.rate, "seed": seed, "device": "cpu", "progress": progress}
            tune(files.base, data, out, epochs=epochs, batch_size=size, **how)  # type: ignore[arg-type]
    result = files.directory / "unlearned"
    with clock.phase("unlearning"):
        data_files = files.questions("forget"), files.questions("retain")
        three = files.full, files.base, files.tuned
        report = unlearn(*three, *data_files, out=result, device="cpu", progress=progress)
    with clock.phase("scoring"):
        table, answers = _before_and_after(files, {"before": files.full, "after": result})
    print("\n".join(["", *table, "", *answers, report.summary(), "", clock.summary()]))


def _write_questions(files: Files, settings: RealSettings, seed: int) -> None:
    authors = make_authors(settings.forget_authors + settings.retain_authors, seed)
    of_role = {"forget": authors[: settings.forget_authors], "retain": authors[settings.forget_authors :]}
    splits = {split: questions(of_role[split.split("_")[0]], phrasings) for split, phrasings in _ASKED.items()}
    files.write_questions(splits | {"all": [*splits["forget"], *splits["retain"]]})


def _before_and_after(files: Files, models: dict[str, Path]) -> tuple[list[str], list[str]]:
    """A table of losses and exact answers, and the first answers of each data set."""
    table = [
        f"{'':8}" + "".join(f"{split.replace('_', ', '):>20}" for split in _ASKED),
        f"{'':8}" + f"{'loss':>12}{'exact':>8}" * len(_ASKED),
    ]
    rows = {split: load_rows(files.questions(split)) for split in _ASKED}
    said: dict[str, Sequence[str]] = {}
    for name, path in models.items():
        module = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        samples = {split: encode(rows[split], tokenizer, _MAX_LENGTH) for split in _ASKED}
        scores = [score(module, samples[split]) for split in _ASKED]
        table.append(f"{name:8}" + "".join(f"{one.loss:12.2f}{one.accuracy:6.0f} %" for one in scores))
        prompts = [prompt_of(sample) for split in ("forget", "retain") for sample in samples[split][:_SHOWN]]
        said[name] = greedy_answers(module, tokenizer, prompts, batch_size=len(prompts), max_new_tokens=_ANSWER_TOKENS)
    asked = [row for split in ("forget", "retain") for row in rows[split][:_SHOWN]]
    lines = []
    for number, row in enumerate(asked):
        lines.append(f"{'forget' if number < _SHOWN else 'retain'}: {row.content['question']}")
        lines += [f"  {name:7} {printable(said[name][number])}" for name in models] + [""]
    return table, lines
