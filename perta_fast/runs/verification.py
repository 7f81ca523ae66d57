"""What the verification of a finished run found."""

from dataclasses import dataclass, field

from perta_fast.errors import printable_lines
from perta_fast.records.file_hashes import HASHES


@dataclass
class Verification:
    """What was checked. ``problems`` is empty if everything that could be checked is right.

    files: number of hashes that agree with the report. companions: files beside the shards whose hashes agree with
    ``perta_files.b3``. recomputed: tensors equal to the reference's, bit for bit (if p is not one of
    ``EXACT_POWERS``, up to the last bit of a power). bounded: tensors whose elements all lie between theta and
    theta - lam * tau, which is checked if the importances were not kept. unchecked: what could not be checked, and why.
    changed: data files and model cards of inputs that have changed since the run, which says nothing against the
    output. card: the problems with the output's model card, which are in ``problems`` too. uncovered: files of which
    the run kept no hash. claim: what the run says of its output. tensors: number of tensors of the output. agreement:
    how closely the recomputed ones agree. prompts: what the chat template was told for each importance, as the run
    says.
    """

    claim: str = ""
    tensors: int = 0
    agreement: str = "bit for bit"
    files: int = 0
    companions: int = 0
    recomputed: int = 0
    bounded: int = 0
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    card: list[str] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The outcome in plain sentences."""
        lines = [self._outcome(), *self.prompts, f"{self.files} files have the hashes in the report."]
        if self.companions:
            lines.append(f"{self.companions} files beside the shards, with the report, have the hashes in {HASHES}.")
        if self.recomputed:
            lines.append(f"{self.recomputed} tensors equal the reference's result {self.agreement}.")
        if self.bounded:
            lines.append(f"{self.bounded} tensors lie between theta and theta - lambda * tau everywhere.")
        lines += [f"Changed since the run, which is no fault of the output: {line}." for line in self.changed]
        lines += [f"Not checked: {line}." for line in self.unchecked]
        lines += [f"Not covered by the run's hashes: {line}." for line in self.uncovered]
        lines += [f"WRONG: {line}." for line in self.problems]
        if self.problems and self.problems == self.card:
            lines.append("Only this text differs: weights, config, tokenizer and report are as the run wrote them.")
        lines.append("Verification failed." if self.problems else "Nothing wrong was found.")
        return printable_lines(lines)

    def _outcome(self) -> str:
        """The result in one sentence."""
        if self.problems != self.card:
            return f"Not confirmed, as something is wrong: {self.claim}."
        if self.recomputed + self.bounded == 0:
            return f"No tensor was computed again, so it is not known whether {self.claim}. This was checked:"
        if self.bounded:
            return (
                f"Not refuted: {self.claim}. Without the weights, {self.bounded} of {self.tensors} tensors "
                "could only be checked for bounds."
            )
        return (
            f"{self.claim}: {self.files} files and {self.recomputed} of {self.tensors} tensors were checked, "
            f"{self.agreement}."
        )
