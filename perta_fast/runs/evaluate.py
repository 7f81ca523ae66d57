"""``evaluate``: everything is checked, then torch imported, and the model loaded and measured, or walked through."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perta_fast.data.chat import today
from perta_fast.data.forms import Fields
from perta_fast.data.given import NOTHING_GIVEN, Given
from perta_fast.data.given_data import Data, taken_out
from perta_fast.distributed.ranks import Ranks
from perta_fast.errors import InputError, shell_command
from perta_fast.evaluation.begun import Begun
from perta_fast.evaluation.checks import Checked
from perta_fast.evaluation.metrics import MIN_K
from perta_fast.evaluation.request import Request
from perta_fast.evaluation.results import Evaluation
from perta_fast.evaluation.run import run
from perta_fast.files.identity import is_same
from perta_fast.files.kept_parts import KeptParts
from perta_fast.files.reading import checked_path
from perta_fast.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup

    from perta_fast.streaming.forecast.forecast import Forecast


def evaluate(
    model_or_path: "str | Path | nn.Module",
    *,
    suite: Literal["tofu", "muse"] | None = None,
    data: str | Path | None = None,
    split: str = "forget10",
    forget: Data | None = None,
    retain: Data | None = None,
    holdout: Data | None = None,
    fields: Fields | None = None,
    download: bool = False,
    reference: str | Path | None = None,
    reference_model: str | Path | None = None,
    min_k: float = MIN_K,
    metrics: Sequence[str] | None = None,
    lm_eval: Sequence[str] = (),
    tokenizer: Any = None,
    batch_size: int = 16,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    system_prompt: str | None = None,
    date_string: str | None = None,
    compatible: Literal["open-unlearning"] | None = None,
    stress: Sequence[str] | None = None,
    against: str | Path | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    show_text: bool = False,
    stream: bool = False,
    memory: int | None = None,
    device_memory: int | None = None,
    open_unlearning_dir: str | Path | None = None,
    progress: Progress = True,
    group: "ProcessGroup | None" = None,
) -> Evaluation:
    """Measure what a causal language model has forgotten and kept, under open-unlearning's names.

    model_or_path: a checkpoint directory, or a model of transformers with its ``tokenizer``; the model does not
    change. suite, data: TOFU, with the forget set ``split``, or MUSE, in a directory with the data set's own file
    names. Without a suite: forget, retain, holdout, files or rows as for ``unlearn``, as are fields and download;
    forget is needed.
    reference: the result file of a gold model, for forget quality and PrivLeak. reference_model: a checkpoint with the
    same tokens, for the membership score ``mia_reference``; it runs in ``dtype`` too. min_k: share of the tokens for
    Min-K and Min-K++.
    metrics: names of the metrics to compute, patterns such as ``forget_*``, or groups (``metric_table.GROUPS``).
    None: all that the data allows, but those that are only computed when they are named.
    lm_eval: tasks for lm-evaluation-harness. max_new_tokens: length of greedy answers; None takes the suite's own.
    system_prompt, date_string: for the tokenizer's chat template, with every question; not for MUSE. Without a date, a
    template that asks for one is told that of the start; ``settings["date"]`` of the result is what it was told.
    compatible: measure as open-unlearning does where it differs (docs/evaluation.md), to set beside published tables;
    not for MUSE, nor with max_length. If the model has a repetition penalty, answers then depend on batch_size.
    stress: what is done to the model, and undone, before its teacher-forced metrics are computed again: ``int8`` and
    ``int4`` round the weights of linear maps (``models.rounding``), ``relearn=20`` takes 20 steps on a tenth of the
    forget rows (``models.relearning``). against: with it, the checkpoint of which codes are counted that differ; None
    takes the one that the model's report names, if that is still there and weights are rounded.
    out: file to write, ending in .json. It holds no text of any set unless ``show_text``. Of a checkpoint, finished
    parts are kept beside it until then: the same call without ``overwrite``, or ``resume``, goes on with a stopped
    evaluation. overwrite: replace the file, start over.
    stream: walk through the layers of a checkpoint that is larger than the memory, one at a time, for the metrics that
    are made of token scores; they are the same numbers. Those that need generated text or gradients are left out, and a
    note names them. Not with lm_eval or stress. memory, device_memory: bytes that this may take; None sets no limit.
    open_unlearning_dir: a directory for the results of a suite as open-unlearning lays them out too, such as
    TOFU_EVAL.json and TOFU_SUMMARY.json, of the metrics that are defined as there. TOFU needs ``compatible`` with it.
    batch_size, max_length, device, dtype, progress: as for ``estimate_importance``. group: with ``stream``, processes
    that deal the samples among them; each calls this with the same arguments and has the result, which the first
    writes.

    Raises InputError for bad input, before the model is loaded where possible, or an input that changed since a stopped
    evaluation began; RunError if ``out`` cannot be written; ``errors.Interrupted`` if it is stopped with a part
    finished. Memory: the model, the reference model while it is scored, and the logits of one batch, which are
    compared in float32. Under a stress, a second copy of the weights that it changes; ``relearn`` takes 12 more
    bytes for each parameter, 18 if it has 16 bits. With ``stream``, one layer in place of the model; the hidden states
    of all samples lie on disk, beside ``out``, or without one where temporary files do.
    """
    arguments: dict[str, Any] = locals()
    ranks = Ranks.of(group)
    with ranks.together("the arguments"):
        arguments, given = taken_out(arguments, ("forget", "retain", "holdout"))
        request = Request.of(arguments)
        request.check()
        request = request.located(download)
    model = model_or_path if request.model is None else request.model
    return _run(request, model, tokenizer, progress, ranks, overwrite=overwrite, resume=False, given=given)


def resume_evaluation(final: Path, progress: Progress, ranks: Ranks = Ranks.ALONE) -> Evaluation:
    """Go on with the stopped evaluation to ``final``."""
    with ranks.together("the unfinished evaluation"):
        begun = Begun.load(final)
        if begun is None or begun.request.out is None or not is_same(checked_path(begun.request.out), final):
            raise InputError(f"{final}: the evaluation to finish was one to another file; give it that name again")
        if ranks.world > 1 and not begun.request.stream:
            raise InputError(f"{final}: is finished by one process: {shell_command('perta', 'resume', final)}")
    assert begun.request.model is not None
    return _run(begun.request, begun.request.model, None, progress, ranks, overwrite=True, resume=True)


def preview(request: Request, ranks: int = 1) -> "Forecast":
    """What a streamed evaluation will take. Raises InputError for bad input, and if memory or disk are too small.

    ranks: processes; the costs are those of one. A file is written to measure the disk, and removed.
    """
    checked = Checked.of(replace(request, out=None), overwrite=False, resume=False)
    destination = Path(tempfile.gettempdir()) if request.out is None else Path(request.out).parent
    from perta_fast.runs.evaluate_streamed import forecast

    return forecast(checked, destination, ranks)


def _run(
    request: Request,
    model_or_path: "str | Path | nn.Module",
    tokenizer: Any,
    progress: Progress,
    ranks: Ranks,
    *,
    overwrite: bool,
    resume: bool,
    given: Given = NOTHING_GIVEN,
) -> Evaluation:
    """Check everything, measure, and write. resume: go on, and replace a result that is there nevertheless."""
    with ranks.together("the checks"):
        if ranks.world > 1 and not request.stream:
            raise InputError("one process evaluates a model in memory; give ‹stream›, or start it without torchrun")
        checked = Checked.of(request, overwrite=overwrite, resume=resume, given=given)

    def measure(kept: KeptParts | None, started: str, day: date) -> Evaluation:
        # Imported late: what is wrong so far was said without waiting for torch.
        if request.stream:
            from perta_fast.runs.evaluate_streamed import measure_streamed

            return measure_streamed(checked, tokenizer, progress, ranks, kept, started, day)
        from perta_fast.evaluation.in_memory import measure_loaded

        return measure_loaded(checked, model_or_path, tokenizer, progress, kept, started, day)

    # A model or a tokenizer in memory may be another one at the next call.
    repeatable = request.model is not None and tokenizer is None
    with ranks.sharing_errors("the evaluation"):
        if ranks.first:
            result = run(checked, measure, repeatable=repeatable, overwrite=overwrite and not resume)
        else:
            result = measure(None, "", today())
        with ranks.together("the evaluation"):
            pass  # until the result is written
    shared: Evaluation = ranks.share(result)
    return shared
