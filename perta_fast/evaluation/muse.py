"""MUSE (arXiv 2407.06460): verbatim memory, knowledge memory and privacy leakage."""

from pathlib import Path

from perta_fast.data import Record
from perta_fast.evaluation.datasets import Rows, read_rows
from perta_fast.evaluation.examinee import (
    Examinee,
    label_texts,
    membership,
    memorisation,
    privacy_leakage,
)
from perta_fast.evaluation.results import Metric, Reference
from perta_fast.evaluation.scoring import TokenScores

VERBATIM_TOKENS, KNOWLEDGE_TOKENS = 128, 32
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


def evaluate_muse(examinee: Examinee, rows: dict[str, Rows], reference: Reference | None) -> dict[str, Metric]:
    """VerbMem, KnowMem on both sets, extraction strength, membership; with ``reference``, PrivLeak."""
    for name, each in rows.items():
        examinee.note_file(name, each.path, each.digest, len(each.content))
    found = {"forget_verbmem_ROUGE": _verbatim(examinee, rows["verbmem/forget"])}
    for role in ("forget", "retain"):
        found[f"{role}_knowmem_ROUGE"] = _knowledge(
            examinee, role, rows[f"knowmem/{role}_qa"], rows[f"knowmem/{role}_qa_icl"]
        )
    forget, holdout = (_score_texts(examinee, rows[f"privleak/{role}"], role) for role in ("forget", "holdout"))
    strength, exact = memorisation([scores for scores, _ in forget])
    found |= {"extraction_strength": strength, "exact_memorization": exact}
    found |= membership(forget, holdout)
    if reference is not None:
        found["privleak"] = privacy_leakage(found, reference)
    return found


def check_reference(reference: Reference) -> None:
    """Raise InputError unless the gold results have what PrivLeak is measured by."""
    reference.value("mia_min_k")


def _verbatim(examinee: Examinee, rows: Rows) -> Metric:
    """ROUGE-L F1 of a passage's continuation against as many tokens of the original."""
    tokenizer = examinee.subject.tokenizer
    count = examinee.max_new_tokens or VERBATIM_TOKENS
    truth = [tokenizer(text, add_special_tokens=False)["input_ids"][:count] for text in rows.texts("gt")]
    prompts = [list(tokenizer(text)["input_ids"]) for text in rows.texts("prompt")]
    answers = examinee.answer(prompts, "verbmem", VERBATIM_TOKENS)
    return examinee.rouge(tokenizer.batch_decode(truth, skip_special_tokens=True), answers, "rougeL_f1")


def _knowledge(examinee: Examinee, role: str, rows: Rows, examples: Rows) -> Metric:
    """ROUGE-L F1 of answers to questions, each asked after worked examples and without a chat template."""
    shown = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples.content)
    tokenizer = examinee.subject.tokenizer
    prompts = [
        list(tokenizer(f"{shown}Question: {question}\nAnswer: ")["input_ids"])
        for question in rows.texts("question")
    ]
    answers = examinee.answer(prompts, f"{role} knowmem", KNOWLEDGE_TOKENS, _STOP)
    return examinee.rouge(rows.texts("answer"), answers, "rougeL_f1")


def _score_texts(examinee: Examinee, rows: Rows, role: str) -> list[tuple[TokenScores, str]]:
    records = [
        Record({"text": text}, where) for text, where in zip(rows.texts("text"), rows.places, strict=True)
    ]
    samples = examinee.tokenise(records, role)
    scores = examinee.score(samples, role, detailed=True)
    return list(zip(scores, label_texts(examinee, samples), strict=True))
