"""General ability, by lm-evaluation-harness (the extra ``lm-eval``): called, not rewritten."""

from collections.abc import Sequence
from typing import Any

from perta_fast.errors import InputError
from perta_fast.importance.estimate import Subject


def check_harness() -> None:
    """Raise InputError, saying how to get it, if lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError("lm-evaluation-harness is not installed: pip install 'perta-fast[lm-eval]'") from error


def general_ability(subject: Subject, tasks: Sequence[str], batch_size: int) -> dict[str, dict[str, Any]]:
    """What lm-evaluation-harness finds, by task: its own names and numbers. It loads its data by itself."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=subject.module, tokenizer=subject.tokenizer, batch_size=batch_size)
    found = simple_evaluate(model=model, tasks=list(tasks))
    return {task: dict(numbers) for task, numbers in found["results"].items()}
