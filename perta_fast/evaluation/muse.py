"""MUSE (arXiv 2407.06460): verbatim memory, knowledge memory and privacy leakage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perta_fast.data.json_lines import Row
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.errors import InputError
from perta_fast.evaluation.benchmark_files import Rows, read_rows
from perta_fast.evaluation.examinee import Examinee, Scored, membership, memorisation, privacy_leakage
from perta_fast.evaluation.results import EvaluationFile, Metric

VERBATIM_TOKENS, KNOWLEDGE_TOKENS = 128, 32
SCORED_TOKENS = 2048  # of a text at most, as in open-unlearning
_STOP = ("\n\n", "\nQuestion", "Question:")


def read_muse(folder: Path) -> dict[str, Rows]:
    """The files of one corpus (News or Books), by the paths that the authors' scripts give them."""
    question = ("question", "answer")
    files = {
        "verbmem/forget": ("prompt", "gt"),
        "knowmem/forget_qa": question,
        "knowmem/forget_qa_icl": question,
        "knowmem/retain_qa": question,
        "knowmem/retain_qa_icl": question,
        "privleak/forget": ("text",),
        "privleak/holdout": ("text",),
    }
    return {name: read_rows(folder, name, fields) for name, fields in files.items()}


def evaluate_muse(examinee: Examinee, rows: dict[str, Rows], reference: EvaluationFile | None) -> dict[str, Metric]:
    """VerbMem, KnowMem on both sets, extraction strength, membership; with ``reference``, PrivLeak."""
    for name, file in rows.items():
        examinee.note_file(name, file.path, file.digest, len(file.content))
    passages = rows["verbmem/forget"]
    results = {"forget_verbmem_ROUGE": _verbatim(examinee, passages)}
    for role in ("forget", "retain"):
        results[f"{role}_knowmem_ROUGE"] = _knowledge(
            examinee, role, rows[f"knowmem/{role}_qa"], rows[f"knowmem/{role}_qa_icl"]
        )
    prompts = passages.texts("prompt")
    whole = [f"{prompt} {truth}" for prompt, truth in zip(prompts, passages.texts("gt"), strict=True)]
    continued = _score_texts(examinee, "verbmem", prompts, whole, passages.places)
    results |= memorisation([scores for scores, _ in continued])
    scored = []
    for role in ("forget", "holdout"):
        file = rows[f"privleak/{role}"]
        scored.append(_score_texts(examinee, role, [""] * len(file.places), file.texts("text"), file.places))
    results |= membership(*scored)
    if reference is not None:
        results["privleak"] = privacy_leakage(results, reference)
    return results


def _verbatim(examinee: Examinee, rows: Rows) -> Metric:
    """ROUGE-L F1 of a passage's continuation against as many tokens of the original."""
    tokenizer = examinee.subject.tokenizer
    count = examinee.max_new_tokens or VERBATIM_TOKENS
    truth = [tokenizer(text, add_special_tokens=False)["input_ids"][:count] for text in rows.texts("gt")]
    prompts = [_opening(tokenizer, text) for text in rows.texts("prompt")]
    answers = examinee.answer(prompts, "verbmem", VERBATIM_TOKENS)
    return examinee.rouge(tokenizer.batch_decode(truth, skip_special_tokens=True), answers, "rougeL_f1")


def _knowledge(examinee: Examinee, role: str, rows: Rows, examples: Rows) -> Metric:
    """ROUGE-L F1 of answers to questions, each asked after worked examples and without a chat template."""
    shown = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples.content)
    tokenizer = examinee.subject.tokenizer
    prompts = [_opening(tokenizer, f"{shown}Question: {question}\nAnswer: ") for question in rows.texts("question")]
    answers = examinee.answer(prompts, f"{role} knowmem", KNOWLEDGE_TOKENS, _STOP)
    return examinee.rouge(rows.texts("answer"), answers, "rougeL_f1")


def _score_texts(
    examinee: Examinee, role: str, prompts: Sequence[str], texts: Sequence[str], places: Sequence[str]
) -> Scored:
    """Scores of what each text has after the prompt that it begins with, and what that says."""
    records = [Row({"text": text}, where) for text, where in zip(texts, places, strict=True)]
    samples = []
    for prompt, record, whole in zip(prompts, records, examinee.tokenise(records, role), strict=True):
        begin = max(1, len(_opening(examinee.subject.tokenizer, prompt)))  # the first token is never predicted
        end = begin + SCORED_TOKENS
        ids, labels = whole.input_ids[:end], whole.labels[begin:end]
        if not labels:
            raise InputError(f"{record.where}: its prompt leaves no token to score within {len(ids)} tokens")
        samples.append(Sample(ids, (IGNORED,) * begin + labels))
    return examinee.score_with_texts(samples, role)


def _opening(tokenizer: Any, text: str) -> list[int]:
    """Tokens that more is to follow."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers close every text
