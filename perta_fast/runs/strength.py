"""``unlearn`` without a strength: it searches for the largest at which little of the retain data is lost.

If no bound was given either, it goes no further than to the forget loss of theta_0, which has not seen the forget data:
beyond it nothing more is forgotten, and the model only shows that something was removed.

theta_0 and theta_full are scored before the first gradient, so that data or a model that cannot be scored is refused in
time; once the importances are there, the search of ``scoring`` tries strengths on it. All score the same rows, with
the tokens that the gradients are taken on.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from perta_fast.arguments import check_sizes
from perta_fast.data.chat import ChatSettings, told
from perta_fast.data.rows import Row, evenly_spread
from perta_fast.errors import InputError, RunError
from perta_fast.files.identity import is_same
from perta_fast.records.report import Report
from perta_fast.records.strength_choice import StrengthChoice, TriedStrength
from perta_fast.rules import DEFAULT_RETAIN_RISE
from perta_fast.runs.encoded_rows import EncodedRows
from perta_fast.scoring.base_loss import ForgetLimit
from perta_fast.scoring.criteria import LOSS
from perta_fast.scoring.search import LARGEST, search
from perta_fast.scoring.setting import Limits, ScoredSetting

if TYPE_CHECKING:
    from perta_fast.evaluation.examinee import Examinee
    from perta_fast.runs.unlearn_inputs import Opened
    from perta_fast.scoring.live_model import LiveModel, ScoredData

ROWS = 200  # of each data set that are scored; fewer if it has fewer
PHASE = "choice of lambda"
_WITHOUT_BASE = "Give ‹max_retain_rise›, up to which base is not looked at"


@dataclass
class StrengthSearch:
    """The search of one run. live: kept for rule ``tv``.

    original, base, data, encoded (of ``data``): on the first rank alone, which scores. base: the forget loss of
    theta_0, in nats, if it is asked for. choice: once it is found.
    """

    opened: "Opened"
    rows: dict[str, int]
    totals: dict[str, int]
    data: "ScoredData | None" = None
    encoded: EncodedRows = field(default_factory=EncodedRows)
    original: ScoredSetting | None = None
    base: float | None = None
    choice: StrengthChoice | None = None
    live: "LiveModel | None" = None
    seconds: float = 0.0

    @classmethod
    def begin(cls, opened: "Opened", rows: Mapping[str, list[Row]], day: date) -> "StrengthSearch | None":
        """Score theta_full as it is; None if the run has a strength. Every rank calls it; they exchange nothing.

        Raises InputError if theta_full, or theta_0 where it sets a limit, cannot be scored on the data.
        """
        options = opened.options
        if options.lam is not None:
            return None
        started = time.perf_counter()
        chosen = {role: [rows[role][k] for k in evenly_spread(len(rows[role]), ROWS)] for role in ("forget", "retain")}
        count, total = ({role: len(some[role]) for role in chosen} for some in (chosen, rows))
        begun = cls(opened, count, total)
        if opened.ranks.first:
            begun._tokenise(chosen, day)
            if options.max_retain_rise is None and not is_same(options.base, options.model):
                begun._score_base()
            begun._score_original()
        begun.seconds = time.perf_counter() - started
        return begun

    def on(self, opened: "Opened") -> "StrengthSearch":
        """The same search with another θ_f."""
        return replace(self, opened=opened)

    def find(self, importances: Path | None) -> StrengthChoice:
        """Search. importances: where both lie, or their ratio; None for rule ``tv``. Every rank calls it.

        Raises RunError if no strength keeps the bound.
        """
        started = time.perf_counter()
        ranks, rule = self.opened.ranks, self.opened.rule
        original: ScoredSetting = ranks.share(self.original)
        most: float | None = ranks.share(self.forget_limit.loss)
        bound = self.bound
        limits = Limits(original.retain_loss + bound, forget_loss=most)
        live = None
        with ranks.together(PHASE):
            if ranks.first:
                from perta_fast.scoring.importances import importances_in

                live, self.live = self.live or self._load(), None
                loaded = {} if importances is None else importances_in(importances)

        def measure(lam: float) -> ScoredSetting:
            with ranks.together(PHASE):
                scored = None if live is None else live.measure(rule.at(lam), loaded)
            shared: ScoredSetting = ranks.share(scored)
            return shared

        tried = search(measure, lambda setting: setting.excess(limits), original)
        self.seconds += time.perf_counter() - started
        kept = [setting for setting in tried if setting.keeps(limits)]
        with ranks.together(PHASE):
            if not kept:
                raise RunError(_nothing_keeps(bound, most, original, tried) + self._what_is_kept())
        best = max(kept, key=lambda setting: setting.lam)
        self.choice = StrengthChoice(
            max_retain_rise=bound,
            metric=LOSS,
            rows=self.rows,
            totals=self.totals,
            before=_tried(original),
            after=_tried(best),
            tried=list(map(_tried, tried)),
            base_forget_loss=most,
        )
        return self.choice

    @property
    def forget_limit(self) -> ForgetLimit:
        """The largest forget loss, if theta_0 sets one; on the first rank alone."""
        return ForgetLimit() if self.original is None else ForgetLimit.of(self.base, self.original.forget_loss)

    def _what_is_kept(self) -> str:
        kept = self.opened.options.save_importance
        if kept is None:
            return ""
        return f". The importances are kept in {kept}; perta apply and perta sweep take them"

    @property
    def bound(self) -> float:
        """Nats by which the retain loss may rise."""
        given = self.opened.options.max_retain_rise
        return DEFAULT_RETAIN_RISE if given is None else float(given)

    def _tokenise(self, rows: Mapping[str, list[Row]], day: date) -> None:
        from perta_fast.models.loading import row_samples, subject_without_weights
        from perta_fast.scoring.live_model import ScoredData

        options = self.opened.options
        check_sizes(options.batch_size, options.max_length)
        chat = ChatSettings.of(options.system_prompt, options.date_string, day)
        reader = subject_without_weights(Path(options.model if options.at == "model" else options.base), chat)
        samples = {role: list(chain(*row_samples(reader, some, options.max_length))) for role, some in rows.items()}
        self.data = ScoredData(samples)
        for role, of_role in samples.items():
            self.encoded.note(role, of_role, told(reader.tokenizer))

    def _score_base(self) -> None:
        from perta_fast.scoring.live_model import score_base

        base = Path(self.opened.options.base)
        assert self.data is not None
        self.base = score_base(base, lambda: self._examinee(base), self.data.samples["forget"], _WITHOUT_BASE)

    def _score_original(self) -> None:
        from perta_fast.models.loading import samples_for

        options, data = self.opened.options, self.data
        assert data is not None
        live = self._load()
        for role, of_role in data.samples.items():
            try:
                samples_for(live.subject, of_role, None)
            except InputError as error:
                raise InputError(f"{options.model}: cannot be scored on the {role} data: {error}") from error
        self.original = live.measure_original({})
        if not self.original.is_finite:
            raise InputError(f"{options.model}: {_why_not_finite(live, str(options.dtype))}")
        if self.opened.rule.estimator is None and not options.preconditions:  # which takes the memory first
            self.live = live

    def _load(self) -> "LiveModel":
        from perta_fast.scoring.live_model import LiveModel

        options, sources = self.opened.options, self.opened.sources
        examinee = self._examinee(Path(options.model))
        assert self.data is not None
        directories = str(options.base), str(options.tuned)
        return LiveModel(examinee, self.data, LOSS, sources.model, directories, options.common_rows, sources.left)

    def _examinee(self, path: Path) -> "Examinee":
        from perta_fast.evaluation.examinee import Examinee
        from perta_fast.models.loading import load_subject

        options = self.opened.options
        subject = load_subject(path, options.device, options.dtype, text=False, progress=options.progress)
        return Examinee(subject, options.batch_size, options.max_length, options.progress)


def annotate(report: Report, search: StrengthSearch | None) -> None:
    """Put in the report how lam was chosen, if it was."""
    if search is None:
        return
    choice = report.choice = search.choice
    assert choice is not None
    report.add_phase(PHASE, search.seconds, 0)
    if warning := search.forget_limit.warning:
        report.warn(warning)
    if choice.after.lam == LARGEST:
        report.warn(
            f"even lambda {LARGEST:g}, the largest that is tried, keeps the retain loss within the bound, so a larger "
            "one may as well; if too little is forgotten, give a strength of your own"
        )


def _tried(setting: ScoredSetting) -> TriedStrength:
    losses = (setting.forget_loss, setting.retain_loss)
    return TriedStrength(setting.lam, *(loss if math.isfinite(loss) else None for loss in losses))


def _why_not_finite(live: "LiveModel", dtype: str) -> str:
    """Why theta_full cannot be scored, and what to do. dtype: that it was told to run in."""
    if dtype != "torch.float16":  # which can make infinite values of finite ones
        for name, parameter in live.subject.module.named_parameters():
            if not parameter.isfinite().all():
                return f"tensor {name} has NaN or infinite values, so no strength can be chosen; give a sound copy"
    return (
        "its losses on the data are not finite, so no strength can be chosen; "
        "run it in float32 or bfloat16 (‹dtype›), or give ‹lam›"
    )


def _nothing_keeps(bound: float, most: float | None, original: ScoredSetting, tried: list[ScoredSetting]) -> str:
    start = f"no lambda that was tried keeps the rise of the retain loss within {bound:g} nats"
    finite = [setting for setting in tried if setting.is_finite]
    nearest = min(finite, key=lambda setting: (setting.retain_loss, setting.lam), default=None)
    if nearest is None:
        return f"{start}: at each the losses are not finite, down to {min(setting.lam for setting in tried)!r}"
    rise = nearest.retain_loss - original.retain_loss
    if most is not None and rise <= bound:
        least = min(finite, key=lambda setting: (setting.forget_loss, setting.lam))
        return (
            f"no lambda that was tried keeps the forget loss below that of base, {most:.4g}: at {least.lam!r} it is "
            f"{least.forget_loss:.4g}. Search up to a bound on the retain loss alone with ‹max_retain_rise›, or give "
            "‹lam›"
        )
    return (
        f"{start}; nearest to it is {nearest.lam!r}, where it rises by {rise:.4g}, from {original.retain_loss:.4g}. "
        "Allow more with ‹max_retain_rise›, or give ‹lam›"
    )
