"""What open-unlearning computes on TOFU, written anew in plain torch from what its source does; nothing is shared.

Read for it: locuslab/open-unlearning, src/data/utils.py, src/data/collators.py, src/evals/metrics/*.py and the configs
of TOFU. Rows are padded in the order of the data, on the right to be scored and on the left to be answered, and the
attention mask is whatever does not equal the padding.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import hmean, ks_2samp
from sklearn.metrics import roc_auc_score

RougeScorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer
NO_LABEL = -100
SCORER = RougeScorer(["rougeL"], use_stemmer=True)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """Tokens of one question and answer."""

    prompt: list[int]
    whole: list[int]

    @property
    def labels(self) -> list[int]:
        return [NO_LABEL] * len(self.prompt) + self.whole[len(self.prompt) :]


class OpenUnlearning:
    """Its numbers for one model. template: arguments of the chat template beside the messages; system: its message."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 32,
        new_tokens: int = 200,
        system: str | None = None,
        **template: Any,
    ) -> None:
        self.model, self.tokenizer, self.batch_size, self.new_tokens = model, tokenizer, batch_size, new_tokens
        self.system, self.template = system, template
        self.end = tokenizer.eos_token_id
        self.padding = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def item(self, question: str, answer: str) -> Item:
        if self.tokenizer.chat_template:
            start = [{"role": "system", "content": self.system}] if self.system else []
            start.append({"role": "user", "content": question})
            how = {"tokenize": True, "return_dict": False, **self.template}
            prompt = self.tokenizer.apply_chat_template(start, add_generation_prompt=True, **how)
            said = [*start, {"role": "assistant", "content": answer}]
            whole = self.tokenizer.apply_chat_template(said, add_generation_prompt=False, **how)
        else:
            text = "Question: " + question + "\n" + "Answer: "
            how = {"add_special_tokens": True, "max_length": 512, "truncation": True}
            prompt, whole = self.tokenizer(text, **how)["input_ids"], self.tokenizer(text + answer, **how)["input_ids"]
        if whole[-1] != self.end:
            whole = [*whole, self.end]
        return Item(list(prompt), list(whole))

    def items(self, rows: Iterable[Row], key: str = "answer") -> list[Item]:
        return [self.item(row["question"], row[key]) for row in rows]

    def batches(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        for begin in range(0, len(items), self.batch_size):
            yield items[begin : begin + self.batch_size]

    def logits(self, items: Sequence[Item]) -> torch.Tensor:
        """(N, T, V) of one batch, padded on the right."""
        width = max(len(item.whole) for item in items)
        ids = torch.tensor([item.whole + [self.padding] * (width - len(item.whole)) for item in items])
        with torch.no_grad():
            logits: torch.Tensor = self.model(input_ids=ids, attention_mask=ids.ne(self.padding)).logits
        return logits.float()

    def losses(self, items: Sequence[Item]) -> list[float]:
        """The mean loss of each item's labels."""
        found = []
        for batch in self.batches(items):
            for item, logits in zip(batch, self.logits(batch), strict=True):
                targets = torch.tensor(item.labels[1:])
                every = torch.nn.functional.cross_entropy(
                    logits[: len(targets)], targets, ignore_index=NO_LABEL, reduction="none"
                )
                found.append(float(every.sum()) / sum(label != NO_LABEL for label in item.labels))
        return found

    def without_end(self, items: Sequence[Item]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(L, V) log-probabilities and (L,) labels of each item without the last label."""
        found = []
        for batch in self.batches(items):
            for item, logits in zip(batch, self.logits(batch), strict=True):
                begin, end = len(item.prompt), len(item.whole) - 1
                found.append((logits.log_softmax(-1)[begin - 1 : end - 1], torch.tensor(item.whole[begin:end])))
        return found

    def extraction(self, items: Sequence[Item]) -> list[float]:
        found = []
        for log_probs, labels in self.without_end(items):
            hits = (log_probs.argmax(-1) == labels).tolist()
            if not hits:
                found.append(0.0)
                continue
            for k in range(len(hits)):  # k stays at the last one if none breaks
                if all(hits[k:]):
                    break
            found.append(1 - k / len(hits))
        return found

    def exactness(self, items: Sequence[Item]) -> list[float]:
        pairs = self.without_end(items)
        return [float((probs.argmax(-1) == labels).float().mean()) for probs, labels in pairs if len(labels)]

    def min_k(self, items: Sequence[Item], *, plus_plus: bool, share: float = 0.4) -> list[float]:
        found = []
        for log_probs, labels in self.without_end(items):
            if not len(labels):
                found.append(0.0)
                continue
            values = log_probs.gather(1, labels[:, None])[:, 0]
            if plus_plus:
                mean = (log_probs.exp() * log_probs).sum(-1)
                variance = (log_probs.exp() * log_probs.square()).sum(-1) - mean.square()
                values = (values - mean) / variance.clamp(min=1e-6).sqrt()
            lowest = np.sort(values.numpy())[: max(1, int(len(values) * share))]
            found.append(float(-lowest.mean()))
        return found

    def compressed(self, items: Sequence[Item]) -> list[float]:
        kept = [[label for label in item.labels if label != NO_LABEL] for item in items]
        texts = [self.tokenizer.decode(labels, skip_special_tokens=True) for labels in kept]
        return [loss / len(zlib.compress(text.encode())) for loss, text in zip(self.losses(items), texts, strict=True)]

    def clean(self, text: str) -> str:
        """The clean-up of transformers 4.45, which open-unlearning asks for."""
        for before, after in (
            *((f" {mark}", mark) for mark in ".?!,"),
            (" ' ", "'"),
            *((f" {short}", short) for short in ("n't", "'m", "'s", "'ve", "'re")),
        ):
            text = text.replace(before, after)
        return text

    def read(self, ids: Sequence[int]) -> str:
        return self.clean(self.tokenizer.decode(ids, skip_special_tokens=True))

    def rouge(self, items: Sequence[Item]) -> list[float]:
        found = []
        for batch in self.batches(items):
            width = max(len(item.prompt) for item in batch)
            ids = torch.tensor([[self.padding] * (width - len(item.prompt)) + item.prompt for item in batch])
            output = self.model.generate(
                ids,
                attention_mask=ids.ne(self.padding),
                do_sample=False,
                max_new_tokens=self.new_tokens,
                use_cache=True,
                pad_token_id=self.end,
            )
            for item, row in zip(batch, output[:, width:].tolist(), strict=True):
                truth = self.read(item.whole).replace(self.read(item.prompt), "").strip()
                answer = self.read(row).split(self.tokenizer.decode([self.end]))[0].strip()
                found.append(SCORER.score(truth, answer)["rougeL"].recall)
        return found

    def wrong(self, rows: Sequence[Row]) -> np.ndarray:
        """(N, K) mean losses of the wrong answers."""
        count = len(rows[0]["perturbed_answer"])
        columns = [[self.item(row["question"], row["perturbed_answer"][k]) for row in rows] for k in range(count)]
        return np.array([self.losses(column) for column in columns]).T

    def membership(self, forget: Sequence[Item], holdout: Sequence[Item]) -> dict[str, float]:
        labels = [0] * len(forget) + [1] * len(holdout)
        scores = {
            "mia_loss": self.losses(forget) + self.losses(holdout),
            "mia_zlib": self.compressed(forget) + self.compressed(holdout),
            "mia_min_k": [v for items in (forget, holdout) for v in self.min_k(items, plus_plus=False)],
            "mia_min_k_plus_plus": [v for items in (forget, holdout) for v in self.min_k(items, plus_plus=True)],
        }
        return {name: float(roc_auc_score(labels, values)) for name, values in scores.items()}

    def tofu(
        self, sets: Mapping[str, Sequence[Row]], gold: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, float], list[float]]:
        """All aggregates, and the truth ratios of the forget set. gold: ``{"auc": ..., "ratios": ...}``."""
        found: dict[str, float] = {}
        ratios = {}
        for role in ("forget", "retain", "ra", "wf"):
            rows, items = sets[role], self.items(sets[role])
            loss, wrong = np.array(self.losses(items)), self.wrong(rows)
            right = (
                np.array(self.losses(self.items(rows, "paraphrased_answer"))) if role in ("forget", "retain") else loss
            )
            found[f"{role}_Q_A_Prob"] = float(np.exp(-loss).mean())
            if role in ("ra", "wf"):
                shares = np.exp(-loss) / (np.exp(-loss) + np.exp(-wrong).sum(1) + 1e-10)
                found[f"{role}_Q_A_Prob_normalised"] = float(shares.mean())
            found[f"{role}_Q_A_ROUGE"] = float(np.mean(self.rouge(items)))
            ratios[role] = np.exp(-wrong.mean(1)) / (np.exp(-right) + 1e-10)
        near = np.minimum(ratios["forget"], 1 / (ratios["forget"] + 1e-10))
        found["forget_truth_ratio"] = float(near.mean())
        for role in ("retain", "ra", "wf"):
            found[f"{role}_Truth_Ratio"] = float(np.maximum(0, 1 - ratios[role]).mean())
        first = {"retain": "Q_A_Prob", "ra": "Q_A_Prob_normalised", "wf": "Q_A_Prob_normalised"}
        nine = [found[f"{role}_{name}"] for role in first for name in (first[role], "Q_A_ROUGE", "Truth_Ratio")]
        found["model_utility"] = float(hmean(nine))
        forget = self.items(sets["forget"])
        found["extraction_strength"] = float(np.mean(self.extraction(forget)))
        found["exact_memorization"] = float(np.mean(self.exactness(forget)))
        found |= self.membership(forget, self.items(sets["holdout"]))
        auc = 0.5 if gold is None else gold["auc"]
        leak = (1 - found["mia_min_k"] - (1 - auc)) / (1 - auc + 1e-10) * 100
        found["privleak_without_gold" if gold is None else "privleak"] = leak
        if gold is not None:
            found["forget_quality"] = float(ks_2samp(ratios["forget"], gold["ratios"]).pvalue)
        return found, ratios["forget"].tolist()
