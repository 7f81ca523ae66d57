"""General ability, by lm-evaluation-harness (the extra ``lm-eval``): called, not rewritten."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from perta_fast.errors import InputError
from perta_fast.models.loading import Subject


def check_harness(tasks: Sequence[str]) -> None:
    """Raise InputError if lm-evaluation-harness cannot be imported, saying how to get it, or lacks a task."""
    try:
        from lm_eval.models.huggingface import HFLM  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'perta-fast[lm-eval]'"
        ) from error
    known = TaskManager().all_tasks
    if unknown := [task for task in tasks if task not in known]:
        raise InputError(f"lm-evaluation-harness has no task {', '.join(unknown)}")


def general_ability(subject: Subject, tasks: Sequence[str], batch_size: int) -> dict[str, dict[str, Any]]:
    """What lm-evaluation-harness finds, by task: its own names and numbers. It loads its data by itself."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = deepcopy(subject.tokenizer)  # the harness gives it a padding token
    model = HFLM(pretrained=subject.module, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(model=model, tasks=list(tasks))
    return {task: dict(numbers) for task, numbers in results["results"].items()}
