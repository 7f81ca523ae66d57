"""The opened inputs of a sweep: checkpoints, data, importances that were given; and the models that it loads.

What is opened is checked before torch is imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.companions import CARD
from perta_fast.checkpoints.configuration import check_configured
from perta_fast.checkpoints.fingerprint import input_files, shard_states, state_of_file
from perta_fast.data.chat import ChatSettings
from perta_fast.data.formats import data_files, stem_of
from perta_fast.data.given import NOTHING_GIVEN, Given
from perta_fast.distributed.ranks import Ranks
from perta_fast.dtypes import torch_dtype, torch_name
from perta_fast.errors import InputError
from perta_fast.evaluation.benchmark_files import DataFile
from perta_fast.files.identity import is_same
from perta_fast.importance.ratio import ImportanceRatio
from perta_fast.importance.store import Importance
from perta_fast.progress import Progress
from perta_fast.rules import PRECONDITIONED, Estimator, Place, Rule, resolved_at
from perta_fast.runs.precondition import check_tuned
from perta_fast.scoring.base_loss import BOUND_ALONE, not_scored
from perta_fast.scoring.importances import Importances, importances_in
from perta_fast.scoring.scored_data import read_scored
from perta_fast.scoring.setting import ScoredSetting
from perta_fast.subtraction.inputs import IMPORTANCES, RATIO, Sources, estimators_of, open_importances
from perta_fast.subtraction.read_beside import read_beside
from perta_fast.subtraction.scope import Scope
from perta_fast.subtraction.task_vector import check_task_vector
from perta_fast.sweeping.grid import Curve
from perta_fast.sweeping.request import Request

if TYPE_CHECKING:
    import torch

    from perta_fast.evaluation.examinee import Examinee
    from perta_fast.models.loading import Subject
    from perta_fast.scoring.live_model import LiveModel
    from perta_fast.streaming.model.skeleton import Skeleton

ByEstimator = dict[Estimator, Importances]
_ROLES = ("forget", "retain", "holdout")  # of data, as perta eval names it


@dataclass(frozen=True)
class OpenedSweep:
    """A checked request with its inputs opened.

    data: forget and retain. also: further data to score, by role. given: the checkpoints with given importances. day:
    when the sweep began. ranks: the processes that do it together; ``progress`` is the first one's. types: in which
    models have run, by their paths.
    """

    request: Request
    curves: list[Curve]
    sources: Sources
    given: dict[Estimator, Sources]
    gold: Checkpoint | None
    data: dict[str, DataFile]
    progress: Progress
    day: date
    also: dict[str, DataFile] = field(default_factory=dict)
    ranks: Ranks = Ranks.ALONE
    types: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        request: Request,
        progress: Progress,
        day: date,
        ranks: Ranks = Ranks.ALONE,
        given_rows: Given = NOTHING_GIVEN,
    ) -> "OpenedSweep":
        """Raises InputError for bad arguments and bad inputs, before a model is loaded."""
        request.check_arguments()
        curves = request.curves()
        sources, given = open_sources(request), _open_given(request, curves)
        if PRECONDITIONED in request.rules:
            check_tuned(Path(request.base), Path(request.tuned))
        opened_sweep = cls(
            request,
            curves,
            sources,
            given,
            None if request.gold is None else Checkpoint.open(request.gold),
            {
                role: read_scored(getattr(request, role), request.metric, request.fields, given_rows)
                for role in ("forget", "retain")
            },
            ranks.first and progress,
            day,
            _read_also(request, given_rows),
            ranks,
        )
        for path in opened_sweep.loaded:
            check_configured(path)
        for opened in (sources, *given.values()):  # which reads weights: after the data, which needs no NumPy
            check_task_vector(opened)
        return opened_sweep

    @property
    def loaded(self) -> list[Path]:
        """The checkpoints that transformers loads."""
        at = [self.sources.base.path if place == "base" else self.sources.model.path for place in self.places]
        return [self.sources.model.path, *at, *([] if self.gold is None else [self.gold.path])]

    def check_base(self) -> None:
        """Raise InputError if files show that the loss of base is to be a limit, and cannot be."""
        path = self.sources.base.path
        if not self.request.up_to_base:
            return
        if is_same(path, self.sources.model.path):
            raise InputError(f"{path}: is both base and model, so its loss is no limit. {BOUND_ALONE}")
        try:
            check_configured(path)
        except InputError as error:
            raise not_scored(path, str(error)) from error

    @property
    def places(self) -> set[Place]:
        """Where gradients are taken, and inputs seen."""
        return {self.place(curve.name) for curve in self.curves if curve.mu is not None or self._is_estimated(curve)}

    def grid(self) -> list[tuple[Curve, float]]:
        """All settings: the strengths of each curve, in order."""
        strengths = sorted(self.request.strengths or ())
        return [(curve, lam) for curve in self.curves for lam in strengths]

    @property
    def scored(self) -> dict[str, DataFile]:
        """All data that is scored, by role."""
        return self.data | self.also

    @property
    def chat(self) -> ChatSettings:
        """What chat templates are told."""
        return ChatSettings.of(self.request.system_prompt, self.request.date_string, self.day)

    def inputs(self) -> dict[str, Checkpoint]:
        """Every directory of tensors that is read, by what it is."""
        directories = dict(self.sources.named())
        if self.gold is not None:
            directories["gold"] = self.gold
        for estimator, sources in self.given.items():
            opened = sources.named()
            for role in opened.keys() & {*IMPORTANCES, RATIO}:
                name = role if len(self.given) == 1 else f"{role}, {estimator}"
                directories[name] = opened[role]
        return directories

    def paths(self) -> list[Path]:
        """Every directory and file that is read."""
        tensors = [path for directory in self.inputs().values() for path in (directory.path, *directory.files())]
        return tensors + [path for file in self.scored.values() for path in data_files(file.path)]

    def state_of_inputs(self) -> dict[str, Any]:
        """By path, what shows whether an input has changed."""
        states: dict[str, Any] = {str(file.path): file.digest for file in self.scored.values()}
        for directory in self.inputs().values():
            states |= shard_states(directory)
        if self.gold is not None:
            states |= input_files(self.gold)
        if self.request.up_to_base:
            states |= input_files(self.sources.base)
        beside = {
            path
            for sources in (self.sources, *self.given.values())
            for at in self.places or (None,)
            for files in read_beside(sources, _taken_at(sources), at).values()
            for path in files.values()
        }
        if self.sources.adapter_config is not None:
            beside.add(self.sources.adapter_config)
        if not self.request.makes_result:
            beside.discard(self.sources.model.path / CARD)
        return states | {str(path): state_of_file(path) for path in beside}

    def load_given(self) -> ByEstimator:
        """The given importances; a tensor is read when it is asked for."""
        return {
            estimator: ImportanceRatio.of_checkpoint(sources.ratio)
            if sources.ratio is not None
            else {role: Importance.load(sources.named()[f"{role}_importance"].path) for role in self.data}
            for estimator, sources in self.given.items()
        }

    def estimated(self) -> list[Estimator]:
        """The estimators whose importances the sweep makes itself."""
        needed = dict.fromkeys(curve.estimator for curve in self.curves if self._is_estimated(curve))
        return [estimator for estimator in needed if estimator is not None]

    def mus(self) -> list[float]:
        """Those of rule ``preconditioned``."""
        return [curve.mu for curve in self.curves if curve.mu is not None]

    def place(self, rule: str) -> Place:
        """Where gradients are taken for a rule, or inputs seen."""
        return resolved_at(rule, cast(Place | None, self.request.at))

    def _is_estimated(self, curve: Curve) -> bool:
        return curve.estimator is not None and curve.estimator not in self.given

    def load_kept(self, folder: Path | None) -> ByEstimator | None:
        """The importances of ``estimated`` that a stopped sweep has kept in ``folder``, if all are there."""
        estimated = self.estimated()
        if not estimated:
            return {}
        if folder is None or not all((folder / name / role).exists() for name in estimated for role in self.data):
            return None
        return {name: importances_in(folder / name) for name in estimated}

    def estimate(self, subject: "Subject", folder: Path | None, skeleton: "Skeleton | None" = None) -> ByEstimator:
        """The importances of ``estimated``; in ``folder``, where a stopped sweep has perhaps kept some, or in memory.

        skeleton: where the weights are read from layer by layer, for a streamed sweep.
        """
        from perta_fast.models.loading import samples_and_told
        from perta_fast.runs.estimate import Estimation, estimate_on

        tokenised = {
            role: samples_and_told(subject, file.rows, self.request.max_length, self.chat, self.progress)
            for role, file in self.data.items()
        }
        form = self.request.kept_form
        stored = "float32" if form.as_ratio else form.dtype
        importances: dict[Estimator, dict[str, Importance]] = {estimator: {} for estimator in self.estimated()}
        for estimator, by_role in importances.items():
            plain = Estimation(
                subject,
                estimator,
                self.request.batch_size,
                self.progress,
                self.ranks,
                skeleton,
                self.request.memory,
                self.request.device_memory,
            )
            for role, file in self.data.items():
                samples, told = tokenised[role]
                how = replace(plain, read_as=file.read_as, told=told)
                out = None if folder is None else folder / estimator / role
                if out is None or not self.ranks.share(out.exists()):  # as a whole: one that exists is complete
                    description = f"{role} importance, {estimator}"
                    importance = estimate_on(how, samples, file.digest, out=out, description=description, stored=stored)
                if out is None:
                    importance.tensors = {name: tensor.cpu() for name, tensor in importance.tensors.items()}
                else:
                    importance = Importance.load(out)
                by_role[role] = importance
        return {**importances}

    @property
    def asked_type(self) -> "torch.dtype | None":
        """The type to run in that is asked for."""
        return None if self.request.dtype is None else torch_dtype(self.request.dtype)

    def _type_of(self, path: Path) -> "torch.dtype | None":
        """The type for a model to run in: what is asked for, or what it has run in before; None if neither is known."""
        known = self.types.get(str(path))
        return torch_dtype(known) if self.asked_type is None and known is not None else self.asked_type

    def load(self, path: Path) -> "Subject":
        """A model, on the device and in the type of the sweep, and its tokenizer as it is."""
        from perta_fast.models.loading import load_subject

        return self._known(path, load_subject(path, self.request.device, self._type_of(path), progress=self.progress))

    def structure(self, path: Path, text: bool = True) -> "tuple[Subject, Skeleton]":
        """``load``, without the weights, and what reads them layer by layer. text: whether a tokenizer is needed."""
        from perta_fast.models.loading import load_subject
        from perta_fast.runs.estimate import open_skeleton

        skeleton = open_skeleton(path, self.request.device, self._type_of(path))
        subject = load_subject(path, self.request.device, self._type_of(path), structure=skeleton.model, text=text)
        return self._known(path, subject), skeleton

    def _known(self, path: Path, subject: "Subject") -> "Subject":
        """``subject``, when its type is noted down: a sweep that is stopped goes on in it on any processor."""
        self.types[str(path)] = torch_name(subject.module.dtype)
        return subject

    def live(self) -> "LiveModel":
        """theta_full, loaded."""
        from perta_fast.scoring.live_model import LiveModel, ScoredData

        model, request = self.sources.model, self.request
        examinee, directories = self._examinee(model.path), (request.base, request.tuned)
        data = ScoredData.of(examinee, self.scored, request.metric)
        return LiveModel(examinee, data, request.metric, model, directories, request.common_rows, self.sources.left)

    def score_gold(self, path: Path) -> ScoredSetting:
        """Load the gold model and score it. Raises InputError if its scores are not finite."""
        from perta_fast.scoring.live_model import ScoredData, ScoredModel

        examinee, metric = self._examinee(path), self.request.metric
        scored = ScoredModel(examinee, ScoredData.of(examinee, self.scored, metric), metric).score("gold")
        return checked_gold(scored, path)

    def score_base(self) -> float:
        """The loss of theta_0 on the forget data, in the tokens of theta_full; it is loaded for that alone.

        Raises InputError if it cannot be scored.
        """
        from perta_fast.evaluation.examinee import Examinee
        from perta_fast.models.loading import load_subject, samples_for, subject_without_weights
        from perta_fast.scoring.live_model import score_base

        request, path = self.request, self.sources.base.path
        reader = subject_without_weights(self.sources.model.path, self.chat)

        def load() -> Examinee:
            subject = load_subject(path, request.device, self._type_of(path), text=False, progress=self.progress)
            return Examinee(self._known(path, subject), request.batch_size, request.max_length, self.progress)

        return score_base(path, load, samples_for(reader, self.data["forget"].rows, request.max_length))

    def _examinee(self, path: Path) -> "Examinee":
        from perta_fast.evaluation.examinee import Examinee

        request, subject = self.request, self.told(self.load(path))
        return Examinee(subject, request.batch_size, request.max_length, self.progress)

    def told(self, subject: "Subject") -> "Subject":
        """With a tokenizer whose chat template is told what it is to be told."""
        return replace(subject, tokenizer=self.chat.given_to(subject.tokenizer))


def checked_gold(scored: ScoredSetting, path: Path) -> ScoredSetting:
    """What the gold model in ``path`` scores. Raises InputError if that is not finite."""
    if not scored.is_finite:
        raise InputError(f"{path}: what the gold model scores is not finite")
    return scored


def checkpoints_of(rule: Rule, importances: ByEstimator) -> dict[str, Checkpoint]:
    """Those that ``rule`` needs, of importances on disk, by role."""
    if rule.estimator is None:
        return {}
    weighing = importances[rule.estimator]
    if isinstance(weighing, ImportanceRatio):
        return open_importances(rule, both=weighing.directory)
    return open_importances(rule, weighing["forget"].directory, weighing["retain"].directory)


def _read_also(request: Request, given_rows: Given) -> dict[str, DataFile]:
    """The further data to score, by role: the names of the files. Raises InputError for one that is taken."""
    holdout = request.holdout
    files = {} if holdout is None else {"holdout": read_scored(holdout, request.metric, request.fields, given_rows)}
    for path in request.also:
        role = stem_of(path)
        if not role.strip():
            raise InputError(f"‹also› has {path}, which has no name to call its scores by; give the file one")
        if role in (*_ROLES, *files):
            taken = f"is that of the {role} data" if role in _ROLES else "two files have"
            raise InputError(f"‹also› has {path}: its name, {role}, {taken}; give the file another name")
        files[role] = read_scored(path, request.metric, request.fields)
    return files


def _taken_at(sources: Sources) -> dict[str, str]:
    return {role: table["evaluated_at"] for role, table in sources.metadata.items()}


def open_sources(
    request: Request, importances: Mapping[str, Checkpoint] = MappingProxyType({}), tuned: Path | None = None
) -> Sources:
    """The checkpoints with importances, by role. tuned: another theta_f. Raises InputError if they do not fit."""
    three = request.model, request.base, request.tuned if tuned is None else tuned
    return Sources.open(*three, importances, request.common_rows, Scope.of(request.only, request.leave))


def _open_given(request: Request, curves: Sequence[Curve]) -> dict[Estimator, Sources]:
    """Open and match the directories of importances that were given: for each estimator two, or one of both.

    Raises InputError for one that does not fit the checkpoints, lacks its partner, or serves none of the rules.
    """
    given: dict[Estimator, Sources] = {}
    pairs = zip_longest(request.forget_importance, request.retain_importance)
    for texts in [*((*pair, None) for pair in pairs), *((None, None, path) for path in request.importance)]:
        paths = [None if text is None else Path(text) for text in texts]
        held = estimators_of(*paths)
        served = [curve for curve in curves if curve.estimator in held]
        needing = [curve for curve in curves if curve.estimator is not None]
        curve = [*served, *needing, *curves][0]  # the next lines refuse the pair unless it serves one
        if curve.mu is not None:
            raise InputError(
                f"rule {PRECONDITIONED}, which is the default, takes no importance; leave it out, or give a rule that "
                "takes importances, such as fisher"
            )
        rule = curve.rule
        sources = open_sources(request, open_importances(rule, *paths))
        assert rule.estimator is not None
        if rule.estimator in given:
            where = next(path for path in paths if path is not None)
            raise InputError(f"{where}: another importance of estimator {rule.estimator} was given already")
        given[rule.estimator] = sources
    return given
