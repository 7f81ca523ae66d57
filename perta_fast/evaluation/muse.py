"""MUSE (arXiv 2407.06460): verbatim memory, knowledge memory and privacy leakage."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from perta_fast.data.rows import Row
from perta_fast.data.samples import IGNORED, Sample, opening_tokens
from perta_fast.errors import InputError
from perta_fast.evaluation.benchmark_files import DataFile, benchmark_file, read_benchmark_file
from perta_fast.evaluation.examinee import Scored
from perta_fast.evaluation.metric_table import MetricTable
from perta_fast.evaluation.offers import MEMBERSHIP, MEMORISATION, offer_membership, offer_memorisation, offer_rouge
from perta_fast.evaluation.results import EvaluationFile
from perta_fast.models.scores import TokenScores

VERBATIM_TOKENS, KNOWLEDGE_TOKENS = 128, 32
SCORED_TOKENS = 2048  # at most, of a text; as in open-unlearning
_QUESTION = ("question", "answer")
_FIELDS = {  # of the rows of each file
    "verbmem/forget": ("prompt", "gt"),
    "knowmem/forget_qa": _QUESTION,
    "knowmem/forget_qa_icl": _QUESTION,
    "knowmem/retain_qa": _QUESTION,
    "knowmem/retain_qa_icl": _QUESTION,
    "privleak/forget": ("text",),
    "privleak/holdout": ("text",),
}
_RETAIN, _OLDER_RETAIN = "knowmem/retain_qa", "knowmem/retain2_qa"
_STOP = ("\n\n", "\nQuestion", "Question:")


def read_muse(folder: Path, *, partly: bool = False) -> dict[str, DataFile]:
    """The files of one corpus (News or Books), by the paths that the authors' ``load_data.py`` gives them.

    In ``privleak`` rows are texts or objects with a ``text``. The retain set's questions may have their older name,
    ``retain2_qa``. Worked examples (``*_qa_icl``) may be missing: the authors' code can do without. partly: others may
    be missing too, but not all.
    """
    stems = {name: name for name in _FIELDS}
    if benchmark_file(folder, _RETAIN) is None and benchmark_file(folder, _OLDER_RETAIN) is not None:
        stems[_RETAIN] = _OLDER_RETAIN
        stems[f"{_RETAIN}_icl"] = f"{_OLDER_RETAIN}_icl"
        if benchmark_file(folder, f"{_OLDER_RETAIN}_icl") is None:
            stems[f"{_RETAIN}_icl"] = f"{_RETAIN}_icl"
    there = {name for name, stem in stems.items() if benchmark_file(folder, stem) is not None}
    if partly and there:
        stems = {name: stem for name, stem in stems.items() if name in there}
    return {
        name: read_benchmark_file(folder, stem, _FIELDS[name])
        for name, stem in stems.items()
        if name in there or not name.endswith("_icl")
    }


class MuseMetrics(MetricTable):
    """VerbMem, KnowMem on both sets, extraction strength, membership; with ``reference``, PrivLeak.

    What needs a file that is missing is not offered.
    """

    forget_file = "verbmem/forget"

    def __init__(self, files: Mapping[str, DataFile], reference: EvaluationFile | None) -> None:
        super().__init__(files)
        passages = "verbmem/forget"
        if self._has(passages, "forget_verbmem_ROUGE", *MEMORISATION):
            texts = files[passages].texts("gt")
            offer_rouge(self, "forget_verbmem_ROUGE", texts, self._continued, "rougeL_f1", self._originals)
        for role in ("forget", "retain"):
            name, questions = f"{role}_knowmem_ROUGE", f"knowmem/{role}_qa"
            if self._has(questions, name):
                answers = partial(self._answers, role)
                offer_rouge(self, name, files[questions].texts("answer"), answers, "rougeL_f1")
        if passages in files:
            offer_memorisation(self, "", self._scored_passages)
        if all(self._has(f"privleak/{role}", *MEMBERSHIP, "privleak") for role in ("forget", "holdout")):
            offer_membership(self, reference)

    def _has(self, file: str, *names: str) -> bool:
        """Whether the file is there, which the metrics of these names need."""
        if file not in self.files:
            self.lacking |= dict.fromkeys(names, f"the file {file}")
        return file in self.files

    def _originals(self) -> list[str]:
        """The start of each passage's original continuation: as many tokens as are generated, less any BOS.

        MUSE cuts what the tokenizer gives, so a BOS counts as one of the tokens, though the text does not show it.
        """
        tokenizer = self.examinee.subject.tokenizer
        count = self.examinee.max_new_tokens or VERBATIM_TOKENS
        texts = self.files["verbmem/forget"].texts("gt")
        truth = [tokenizer(text)["input_ids"][:count] for text in texts]
        originals: list[str] = tokenizer.batch_decode(truth, skip_special_tokens=True)
        return originals

    def _continued(self) -> list[str]:
        tokenizer, passages = self.examinee.subject.tokenizer, self.files["verbmem/forget"]
        prompts = [opening_tokens(text, tokenizer) for text in passages.texts("prompt")]
        return self.examinee.answer(prompts, "verbmem", VERBATIM_TOKENS)

    def _answers(self, role: str) -> list[str]:
        """Answers to questions, each asked after worked examples and without a chat template."""
        questions, examples = self.files[f"knowmem/{role}_qa"], self.files.get(f"knowmem/{role}_qa_icl")
        if examples is None:
            self.examinee.notes.append(
                f"{role}_knowmem_ROUGE: {role}_qa_icl is missing, so there were no worked examples"
            )
        rows = [] if examples is None else examples.rows
        pairs = [(row.content["question"], row.content["answer"]) for row in rows]
        shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in pairs)
        asked = [f"{shown}Question: {question}\nAnswer: " for question in questions.texts("question")]
        prompts = [opening_tokens(text, self.examinee.subject.tokenizer) for text in asked]
        return self.examinee.answer(prompts, f"{role} knowmem", KNOWLEDGE_TOKENS, _STOP)

    def _passages(self) -> list[Sample]:
        """Each passage after its prompt."""

        def make() -> list[Sample]:
            passages = self.files["verbmem/forget"]
            whole = [Row({"text": f"{row.content['prompt']} {row.content['gt']}"}, row.where) for row in passages.rows]
            return self._after_prompts("verbmem", whole, passages.texts("prompt"))

        return self.once("verbmem samples", make)

    def _scored_passages(self) -> Scored:
        return self.once("verbmem scores", lambda: self.examinee.score_with_texts(self._passages(), "verbmem"))

    def stress_sets(self) -> dict[str, tuple[list[Sample], list[TokenScores]]]:
        """The passages; and the answers to the questions of the retain set, asked without worked examples."""
        sets = {"forget": (self._passages(), [scores for scores, _ in self._scored_passages()])}
        questions = self.files.get(_RETAIN)
        if questions is not None:
            prompts = [f"Question: {question}\nAnswer:" for question in questions.texts("question")]
            pairs = zip(prompts, questions.rows, strict=True)
            whole = [Row({"text": f"{prompt} {row.content['answer']}"}, row.where) for prompt, row in pairs]
            samples = self._after_prompts("retain knowmem", whole, prompts)
            sets["retain"] = samples, self.examinee.score(samples, "retain knowmem", detailed=True)
        return sets

    def samples(self, role: str) -> list[Sample]:
        rows = self.files[f"privleak/{role}"].rows
        return self.once(f"{role} samples", lambda: self._after_prompts(role, rows, [""] * len(rows)))

    def scored(self, role: str) -> Scored:
        return self.once(f"{role} scores", lambda: self.examinee.score_with_texts(self.samples(role), role))

    def _after_prompts(self, role: str, rows: Sequence[Row], prompts: Sequence[str]) -> list[Sample]:
        """Each row with labels on the rest of it, after the prompt that it begins with."""
        samples = []
        for prompt, row, whole in zip(prompts, rows, self.examinee.tokenise(rows, role), strict=True):
            opening = opening_tokens(prompt, self.examinee.subject.tokenizer)
            begin = max(1, len(opening))  # the first token is never predicted
            end = begin + SCORED_TOKENS
            ids, labels = whole.input_ids[:end], whole.labels[begin:end]
            if not labels:
                raise InputError(f"{row.where}: its prompt leaves no token to score within {len(ids)} tokens")
            samples.append(Sample(ids, (IGNORED,) * begin + labels))
        return samples
