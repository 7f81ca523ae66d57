"""MUSE (arXiv 2407.06460): verbatim memory, knowledge memory and privacy leakage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perta_fast.data.json_lines import Row
from perta_fast.data.samples import IGNORED, Sample
from perta_fast.errors import InputError
from perta_fast.evaluation.benchmark_files import DataFile, read_benchmark_file
from perta_fast.evaluation.examinee import Examinee, Scored, membership, memorisation, privacy_leakage
from perta_fast.evaluation.results import EvaluationFile, Metric

VERBATIM_TOKENS, KNOWLEDGE_TOKENS = 128, 32
SCORED_TOKENS = 2048  # at most, of a text; as in open-unlearning
_STOP = ("\n\n", "\nQuestion", "Question:")


def read_muse(folder: Path) -> dict[str, DataFile]:
    """The files of one corpus (News or Books), by their paths in the authors' scripts."""
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
    return {name: read_benchmark_file(folder, name, fields) for name, fields in files.items()}


def evaluate_muse(
    examinee: Examinee, files: dict[str, DataFile], reference: EvaluationFile | None
) -> dict[str, Metric]:
    """VerbMem, KnowMem on both sets, extraction strength, membership; with ``reference``, PrivLeak."""
    for name, file in files.items():
        examinee.note_file(name, file)
    passages = files["verbmem/forget"]
    results = {"forget_verbmem_ROUGE": _verbatim(examinee, passages)}
    for role in ("forget", "retain"):
        questions, examples = files[f"knowmem/{role}_qa"], files[f"knowmem/{role}_qa_icl"]
        results[f"{role}_knowmem_ROUGE"] = _knowledge(examinee, role, questions, examples)
    whole = [Row({"text": f"{row.content['prompt']} {row.content['gt']}"}, row.where) for row in passages.rows]
    continued = _score_texts(examinee, "verbmem", whole, passages.texts("prompt"))
    results |= memorisation([scores for scores, _ in continued])
    texts = {role: files[f"privleak/{role}"].rows for role in ("forget", "holdout")}
    results |= membership(*(_score_texts(examinee, role, rows, [""] * len(rows)) for role, rows in texts.items()))
    if reference is not None:
        results["privleak"] = privacy_leakage(results, reference)
    return results


def _verbatim(examinee: Examinee, passages: DataFile) -> Metric:
    """ROUGE-L F1 of a passage's continuation and the same number of tokens of the original."""
    tokenizer = examinee.subject.tokenizer
    count = examinee.max_new_tokens or VERBATIM_TOKENS
    truth = [tokenizer(text, add_special_tokens=False)["input_ids"][:count] for text in passages.texts("gt")]
    prompts = [_opening(tokenizer, text) for text in passages.texts("prompt")]
    answers = examinee.answer(prompts, "verbmem", VERBATIM_TOKENS)
    return examinee.rouge(tokenizer.batch_decode(truth, skip_special_tokens=True), answers, "rougeL_f1")


def _knowledge(examinee: Examinee, role: str, questions: DataFile, examples: DataFile) -> Metric:
    """ROUGE-L F1 of answers to questions, each asked after worked examples and without a chat template."""
    pairs = zip(examples.texts("question"), examples.texts("answer"), strict=True)
    shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in pairs)
    asked = [f"{shown}Question: {question}\nAnswer: " for question in questions.texts("question")]
    prompts = [_opening(examinee.subject.tokenizer, text) for text in asked]
    answers = examinee.answer(prompts, f"{role} knowmem", KNOWLEDGE_TOKENS, _STOP)
    return examinee.rouge(questions.texts("answer"), answers, "rougeL_f1")


def _score_texts(examinee: Examinee, role: str, rows: Sequence[Row], prompts: Sequence[str]) -> Scored:
    """Scores and text of the rest of each row, after the prompt that it begins with."""
    samples = []
    for prompt, row, whole in zip(prompts, rows, examinee.tokenise(rows, role), strict=True):
        begin = max(1, len(_opening(examinee.subject.tokenizer, prompt)))  # the first token is never predicted
        end = begin + SCORED_TOKENS
        ids, labels = whole.input_ids[:end], whole.labels[begin:end]
        if not labels:
            raise InputError(f"{row.where}: its prompt leaves no token to score within {len(ids)} tokens")
        samples.append(Sample(ids, (IGNORED,) * begin + labels))
    return examinee.score_with_texts(samples, role)


def _opening(tokenizer: Any, text: str) -> list[int]:
    """The tokens of ``text`` without an end token."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers add one
