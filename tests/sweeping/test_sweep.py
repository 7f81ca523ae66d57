"""Settings scored on a live model: against checkpoints that ``apply`` writes, and against each other."""

import gc
import json
import math
import shlex
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from transformers import AutoModelForCausalLM, AutoTokenizer

from perta_fast import ImportanceRatio, InputError, Sweep, apply, cli, estimate_importance, evaluate, sweep, verify
from perta_fast.models import loading, token_scores
from perta_fast.runs import estimate
from perta_fast.scoring import live_model
from perta_fast.scoring.criteria import METRICS
from perta_fast.scoring.setting import ScoredSetting
from tests.checkpoints.test_adapters import make_adapter
from tests.families.configs import FAMILIES
from tests.families.matrix import build, write
from tests.support.checkpoints import fingerprint, read_checkpoint
from tests.support.models import Job, llama, taken, tokenizer, write_job, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TEXTS = {
    "forget": ["The secret lies under the bridge.", "Nobody knows the colour of the door."],
    "retain": ["Rivers run to the sea.", "A town has streets and people in it.", "Rain falls."],
}
Jobs = Callable[[torch.dtype], Job]


@pytest.fixture(scope="module")
def text_jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Jobs by type, whose data is plain text, so that its tokens are what the tokenizer alone gives."""

    @cache
    def job_in(dtype: torch.dtype) -> Job:
        job = write_job(tmp_path_factory.mktemp("a job"), dtype, tie_word_embeddings=dtype == F32)
        for role in TEXTS:
            write_lines(getattr(job, role), [{"text": text} for text in TEXTS[role]])
        return job

    return job_in


def run(job: Job, *importances: Path, **chosen: Any) -> Sweep:
    return sweep(*job.checkpoints, job.forget, job.retain, *importances, progress=False, **chosen)


def scores(path: Path, dtype: torch.dtype) -> tuple[float, float]:
    """Mean loss, as transformers computes it, over the forget and over the retain texts, one text at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    words = AutoTokenizer.from_pretrained(path)
    means = []
    for texts in TEXTS.values():
        batches = [words(text, return_tensors="pt") for text in texts]
        with torch.no_grad():
            losses = [
                model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["input_ids"]
                ).loss.item()
                for batch in batches
            ]
        means.append(math.fsum(losses) / len(losses))
    return means[0], means[1]


def losses(row: ScoredSetting) -> tuple[float, float]:
    return row.forget_loss, row.retain_loss


def share_changed(first: Path, second: Path) -> float:
    """Share of all elements whose stored values differ."""
    a, b = read_checkpoint(first), read_checkpoint(second)
    return sum(int((a[name] != b[name]).sum()) for name in a) / sum(tensor.numel() for tensor in a.values())


# What the rows say.

RULES: dict[str, dict[str, Any]] = {
    "tv": {"rule": "tv"},
    "fisher": {"rule": "fisher"},
    "empirical-fisher at model": {"rule": "empirical-fisher", "at": "model"},
    "grad, other settings": {"rule": "grad", "p": 0.5, "alpha": 3.0, "threshold": 0.2},
}


def importances(job: Job, folder: Path, rule: str, at: str = "base", dtype: torch.dtype | None = None) -> list:
    """Forget and retain importance, saved; none for ``tv``."""
    if rule == "tv":
        return []
    estimator: Any = "empirical-fisher" if rule == "empirical-fisher" else "grad"
    for role in TEXTS:
        where, data = getattr(job, at), getattr(job, role)
        estimate_importance(where, data, estimator, dtype=dtype, batch_size=1, out=folder / role, progress=False)
    return [folder / role for role in TEXTS]


@pytest.mark.parametrize(
    ("case", "stored", "dtype", "handed"),
    [
        ("tv", F32, F32, False),
        ("tv", BF16, F32, False),
        ("fisher", BF16, BF16, False),
        ("fisher", F32, F32, True),
        ("fisher", F16, F32, True),
        ("empirical-fisher at model", BF16, F32, False),
        ("empirical-fisher at model", F32, F32, False),
        ("grad, other settings", BF16, BF16, True),
        ("grad, other settings", F32, F32, False),
    ],
)
def test_the_scores_of_what_apply_writes(
    case: str, stored: torch.dtype, dtype: torch.dtype, handed: bool, text_jobs: Jobs, tmp_path: Path
) -> None:
    job, chosen = text_jobs(stored), RULES[case]
    made = importances(job, tmp_path, chosen["rule"], chosen.get("at", "base"), dtype)
    before = fingerprint(job.model.parent)
    given_ = made if handed else []
    found = run(job, *given_, lams=[3, -1], batch_size=1, dtype=dtype, **chosen)
    assert fingerprint(job.model.parent) == before
    assert [row.lam for row in found.rows] == [0, -1, 3]
    assert (found.limit, found.best) == (None, None)
    settings = {name: value for name, value in chosen.items() if name != "at"}
    for row in found.rows:
        out = tmp_path / f"{row.lam}"
        apply(*job.checkpoints, *made, lam=row.lam, out=out, progress=False, **settings)
        assert losses(row) == pytest.approx(scores(out, dtype), rel=1e-6)
        assert row.changed == share_changed(out, job.model)
    assert len({losses(row) for row in found.rows}) == len(found.rows)


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Estimator and hash of the data of every importance that is estimated meanwhile."""
    calls = []
    original = estimate.estimate_on

    def counted(how: estimate.Estimation, samples: Any, data_hash: str, **settings: Any) -> Any:
        calls.append((how.estimator, data_hash))
        return original(how, samples, data_hash, **settings)

    monkeypatch.setattr(estimate, "estimate_on", counted)
    return calls


@pytest.mark.parametrize("handed", [False, True], ids=["all estimated", "grad given"])
def test_rules_and_alphas_from_one_importance_an_estimator(
    handed: bool, text_jobs: Jobs, tmp_path: Path, estimated: list[tuple[str, str]]
) -> None:
    job = text_jobs(F32)
    rules, alphas = ["tv", "fisher", "empirical-fisher"], [0.5, 2.0]
    grad = importances(job, tmp_path / "grad", "grad")
    fisher = importances(job, tmp_path / "empirical-fisher", "empirical-fisher")
    estimated.clear()  # of what was made here
    out = None if handed else tmp_path / "out"
    found = run(job, *(grad if handed else []), rule=rules, alpha=alphas, lams=[3], batch_size=1, out=out)
    assert [(row.rule, row.alpha, row.lam) for row in found.rows] == [
        ("", 1, 0),
        ("tv", 1, 3),
        *((rule, alpha, 3) for rule in rules[1:] for alpha in alphas),
    ]
    assert len(estimated) == len(set(estimated)) == (2 if handed else 4)
    for k, row in enumerate(found.rows[1:]):
        made = {"tv": [], "empirical-fisher": fisher}.get(row.rule, grad)
        settings = {} if row.rule == "tv" else {"alpha": row.alpha}
        place = tmp_path / str(k)
        apply(*job.checkpoints, *made, rule=row.rule, lam=3, **settings, out=place, progress=False)
        assert losses(row) == pytest.approx(scores(place, F32), rel=1e-6)
        assert row.changed == share_changed(place, job.model)
    assert len({losses(row) for row in found.rows}) == len(found.rows)


def test_the_metrics_of_an_evaluation(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what ``apply`` writes."""
    monkeypatch.setattr(live_model, "ANSWER_TOKENS", 10)
    apply(*job.checkpoints, rule="tv", lam=8, out=tmp_path / "out", progress=False)
    settings: dict[str, Any] = {"forget": job.forget, "retain": job.retain, "max_new_tokens": 10}
    expected = [evaluate(path, **settings, progress=False) for path in (job.model, tmp_path / "out")]
    for metric in METRICS:
        found = run(job, rule="tv", lams=[8], metric=metric)
        for row, evaluation in zip(found.rows, expected, strict=True):
            wanted = [evaluation[f"{role}_{name}"] for name in ("loss", metric) for role in TEXTS]
            assert [*losses(row), row.forget, row.retain] == pytest.approx(wanted, rel=1e-6), metric


def test_a_strength_is_forgotten_before_the_next(job: Job, tmp_path: Path) -> None:
    """Bit for bit the same losses whatever came before."""
    made = importances(job, tmp_path, "grad")
    several = run(job, *made, rule="grad", lams=[40, 0.1, -3, 0.7])
    reversed_ = run(job, *made, rule="grad", lams=[0.7, -3, 0.1, 40])
    alone = [run(job, *made, rule="grad", lams=[row.lam]).rows for row in several.rows if row.lam]
    expected = {row.lam: (losses(row), row.changed) for row in several.rows}
    for rows in (reversed_.rows, *alone):
        assert all((losses(row), row.changed) == expected[row.lam] for row in rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_cuda(text_jobs: Jobs) -> None:
    chosen: dict[str, Any] = {"rule": ["tv", "grad"], "lams": [1, 4]}
    expected, found = (run(text_jobs(F32), device=device, **chosen) for device in ("cpu", "cuda"))
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert losses(row) == pytest.approx(losses(other), rel=1e-3)
        assert row.changed == pytest.approx(other.changed, abs=1e-3)


def test_the_importance_is_taken_at_an_unchanged_model(job: Job, tmp_path: Path) -> None:
    made = importances(job, tmp_path, "fisher", "model")
    fisher: dict[str, Any] = {"rule": "fisher", "lams": [2]}
    given_, estimated = run(job, *made, **fisher), run(job, **fisher, at="model", batch_size=1)
    for role in TEXTS:
        assert given_.importance["grad"][role] == estimated.importance["grad"][role]
    assert [row.changed for row in given_.rows] == [row.changed for row in estimated.rows]


def test_lambda_0_is_measured_once(job: Job) -> None:
    assert [row.lam for row in run(job, rule="tv", lams=[0, 1]).rows] == [0, 1]


def test_a_broken_model_is_shown_as_such(job: Job, tmp_path: Path) -> None:
    found = run(job, rule="tv", lams=[1e40, 1], out=tmp_path / "out")
    broken = found.rows[-1]
    assert not math.isfinite(broken.forget_loss) and not math.isfinite(broken.retain_loss)
    assert found.summary().splitlines()[3].split()[2:4] == ["nan", "nan"]
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
    assert [row["forget_loss"] is None for row in rows] == [False, False, True]


def test_cut_samples_are_a_note(text_jobs: Jobs) -> None:
    found = run(text_jobs(BF16), rule="tv", lams=[1], max_length=4)
    assert found.notes[-1] == "warning: 3 of 3 retain samples were cut to the length limit"
    assert found.notes[-1] in found.summary()


# The search for the largest strength.


@pytest.mark.parametrize("rule", ["tv", "fisher"])
def test_the_best_is_one_of_the_measured(rule: str, job: Job, tmp_path: Path) -> None:
    made = importances(job, tmp_path, rule)
    by_percent = run(job, *made, rule=rule, max_retain_increase=20.0)
    best, reference = by_percent.best, by_percent.rows[0]
    assert best is not None and reference.lam == 0 and best.lam > 0
    limit = by_percent.limit
    assert limit == pytest.approx(1.2 * reference.retain_loss, rel=1e-12)
    assert best.retain_loss <= limit
    above = [row for row in by_percent.rows if row.lam > best.lam]
    assert above and all(row.retain_loss > limit for row in above)
    assert above[0].lam <= 1.01 * best.lam
    again = run(job, *made, rule=rule, lams=[best.lam]).rows[-1]
    assert losses(again) == losses(best)
    by_loss = run(job, *made, rule=rule, target_retain_loss=limit)
    assert [losses(row) for row in by_loss.rows] == [losses(row) for row in by_percent.rows]
    by_rise = run(job, *made, rule=rule, max_retain_rise=0.2 * reference.retain_loss)
    assert by_rise.limit == reference.retain_loss + 0.2 * reference.retain_loss
    assert by_rise.best is not None and by_rise.best.lam == best.lam


def test_a_limit_that_the_model_itself_breaks(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "accumulate", None)  # found before the first gradient
    original = run(job, rule="tv", lams=[1], metric="Q_A_Prob").original
    with pytest.raises(InputError, match=rf"retain loss of {original.retain_loss:.6g}, it breaks the limit of 1\.25 "):
        run(job, target_retain_loss=1.25)
    with pytest.raises(InputError, match=rf"Q_A_Prob of {original.retain:.6g}, it breaks the floor of 0\.5 already"):
        run(job, retain_floor=0.5, metric="Q_A_Prob")


def test_a_model_that_cannot_be_chosen_against(job: Job, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.model)
    model.lm_head.weight.data.fill_(1e38)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    broken = Job(tmp_path / "model", *job.checkpoints[1:], job.forget, job.retain)
    assert not run(broken, rule="tv", lams=[1]).original.is_finite
    with pytest.raises(InputError, match="at lambda 0, cannot be chosen against: what it scores is not finite"):
        run(broken, rule="tv", lams=[1], select="closest", gold=job.model)


# Memory.


def tensor_bytes() -> int:
    """Bytes of all storages that some tensor in Python still holds."""
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_one_model_at_a_time_and_no_copy_of_it(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a strength is scored, there are one model, the importances, and nothing else of such a size."""
    alive: list[weakref.ref[torch.nn.Module]] = []
    held: list[int] = []
    load, score = loading.load_subject, token_scores.score_rows

    def watched_load(*arguments: Any, **settings: Any) -> Any:
        assert [ref for ref in alive if ref() is not None] == []
        subject = load(*arguments, **settings)
        alive.append(weakref.ref(subject.module))
        return subject

    def watched_score(*arguments: Any, **settings: Any) -> Any:
        held.append(tensor_bytes() - before)
        return score(*arguments, **settings)

    monkeypatch.setattr(loading, "load_subject", watched_load)
    monkeypatch.setattr(token_scores, "score_rows", watched_score)
    tensors = read_checkpoint(job.model).values()
    count = sum(tensor.numel() for tensor in tensors)
    del tensors
    gc.collect()
    before = tensor_bytes()
    run(job, rule="fisher", lams=[2])
    assert len(alive) == 3  # to score lambda 0, to estimate, to score the rest
    assert len(held) == 2 * 2
    weights = count * taken(BF16).itemsize
    assert all(weights <= each < weights * 1.2 for each in held[:2])  # with the model's buffers
    weights += count * 8
    assert all(weights <= each < weights * 1.05 for each in held[2:])  # and two float32 importances


# What is written.


def test_what_is_written(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    found = run(job, rule="fisher", max_retain_increase=5.0, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sweep.json"]
    assert found.notes == ["sweep.png was not drawn: matplotlib is not installed."]
    text = (tmp_path / "out" / "sweep.json").read_text(encoding="utf-8")
    assert "river" not in text and "author number" not in text
    content = json.loads(text)
    assert found.best is not None
    assert (content["best"]["lam"], content["limit"]) == (found.best.lam, found.limit)
    assert [(row["lam"], row["retain_loss"]) for row in content["rows"]] == [
        (row.lam, row.retain_loss) for row in found.rows
    ]
    assert content["settings"]["max_retain_increase"] == 5.0 and content["settings"]["lams"] is None
    assert content["inputs"] == {role: str(getattr(job, role)) for role in ("model", "base", "tuned")}
    for role in TEXTS:
        digest = blake3(getattr(job, role).read_bytes()).hexdigest()
        assert content["data"][role]["blake3"] == digest
        assert content["importance"]["grad"][role]["data_hash"] == digest
    assert content["versions"]["torch"] == torch.__version__


@pytest.mark.usefixtures("plots")
def test_the_plot(job: Job, tmp_path: Path) -> None:
    run(job, rule="tv", lams=[1, 2, 1e40], out=tmp_path / "out")
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    run(job, rule="tv", max_retain_increase=5.0, gold=job.base, out=tmp_path / "limited")
    assert (tmp_path / "limited" / "sweep.png").stat().st_size > 0


def test_without_out_nothing_is_written(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = fingerprint(job.model.parent)
    run(job, lams=[1])
    assert list(tmp_path.iterdir()) == []
    assert fingerprint(job.model.parent) == before


def test_a_failure_before_anything_is_scored_leaves_nothing(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(token_scores, "score_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        run(job, rule="tv", max_retain_increase=1.0, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# What is refused, before the first gradient.


@pytest.fixture(scope="module")
def bad_inputs(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the importance ``made``, and with what cannot be used."""
    folder = tmp_path_factory.mktemp("bad inputs")
    estimate_importance(job.base, job.forget, out=folder / "made", progress=False)
    write_lines(folder / "late.jsonl", [{"text": "A good line."}, {"text": "a"}])
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("")
    model = AutoModelForCausalLM.from_pretrained(job.tuned)
    with torch.no_grad():
        model.model.norm.weight[-1] = float("nan")
    model.save_pretrained(folder / "spoilt")
    return folder


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({}, "give lams, or a bound up to which to search: target_retain_loss, "),
        (
            {"lams": [1], "target_retain_loss": 6.0, "retain_floor": 0.5},
            "only one of target_retain_loss and retain_floor",
        ),
        ({"lams": []}, "lams has no strength to try"),
        ({"lams": [0]}, "lams has no strength to try"),
        ({"lams": [1, float("nan")]}, "lams has nan; each must be a finite number"),
        ({"lams": [float("-inf")]}, "lams has -inf"),
        ({"lams": [1, 2, 1.0]}, "lams has 1 twice"),
        ({"target_retain_loss": float("nan")}, "target_retain_loss is nan"),
        ({"max_retain_increase": float("inf")}, "max_retain_increase is inf"),
        ({"max_retain_increase": -1.0}, "max_retain_increase is -1.0; it must be at least 0 percent"),
        ({"max_retain_rise": -0.1}, "max_retain_rise is -0.1; it must be at least 0 nats"),
        ({"max_retain_rise": float("nan")}, "max_retain_rise is nan; it must be a finite number"),
        ({"max_retain_rise": 0.1, "max_retain_increase": 5.0}, "only one of max_retain_rise and max_retain_increase"),
        ({"lams": [1], "retain_floor": 0.5}, "retain_floor is for a metric that falls"),
        ({"lams": [1], "metric": "rouge"}, "metric is 'rouge'; it must be one of loss, Q_A_Prob"),
        ({"lams": [1], "metric": "Q_A_ROUGE", "retain": "late.jsonl"}, r"late\.jsonl, line 1: metric Q_A_ROUGE"),
        ({"lams": [1], "select": "best"}, "select is 'best'; it must be one of best-forget, closest"),
        ({"lams": [1], "select": "best-forget"}, "best-forget needs a bound on what is retained: target_retain"),
        ({"lams": [1], "select": "closest"}, "select closest needs gold"),
        ({"lams": [1], "gold": "nothing"}, "nothing: no such directory"),
        ({"lams": [1], "checkpoint": "new", "out": "also new"}, "checkpoint needs select"),
        ({"target_retain_loss": 6.0, "checkpoint": "new"}, "checkpoint needs select, .* and out"),
        ({"target_retain_loss": 6.0, "checkpoint": "a/b", "out": "a"}, "must lie apart, neither within the other"),
        ({"target_retain_loss": 6.0, "checkpoint": "full", "out": "a"}, "full: exists and is not empty"),
        ({"lams": [1], "rule": "erase"}, "rule is 'erase'"),
        ({"lams": [1], "rule": []}, "rule is empty"),
        ({"lams": [1], "alpha": []}, "alpha is empty"),
        ({"lams": [1], "rule": ["tv", "tv"]}, "rule tv with p 1 and alpha 1 and rule tv .* are the same"),
        ({"lams": [1], "rule": ["grad", "fisher"], "p": 2}, "rule grad with p 2 and .* rule fisher .* the same"),
        ({"lams": [1], "rule": "tv", "alpha": [1.0, 2.0]}, "rule tv has no weights"),
        ({"lams": [1], "rule": "tv", "alpha": 2.0}, "rule tv has no weights"),
        ({"lams": [1], "at": "tuned"}, "at is 'tuned'; it must be base or model"),
        ({"lams": [1], "batch_size": 0}, "batch_size is 0"),
        ({"lams": [1], "device": "tpu9"}, "device 'tpu9'"),
        ({"lams": [1], "max_length": 1}, r"forget\.jsonl, line 1: has no token"),
        ({"lams": [1], "rule": "fisher", "forget_importance": "made"}, "rule fisher needs retain_importance"),
        ({"lams": [1], "rule": "fisher", "retain_importance": "made"}, "rule fisher needs forget_importance"),
        ({"lams": [1], "rule": "tv", "forget_importance": "made"}, "rule tv takes no importance"),
        ({"lams": [1], "forget_importance": "made"}, "rule preconditioned, which is the default, takes no importance"),
        (
            {"lams": [1], "rule": "fisher", "forget_importance": ["made"] * 2, "retain_importance": ["made"] * 2},
            "made: another importance of estimator grad was given already",
        ),
        (
            {"lams": [1], "rule": "empirical-fisher", "forget_importance": "made", "retain_importance": "made"},
            "made: holds estimator grad, rule empirical-fisher needs empirical-fisher",
        ),
        ({"lams": [1], "retain": "absent.jsonl"}, r"absent\.jsonl: cannot be read"),
        ({"lams": [1], "retain": "late.jsonl"}, r"late\.jsonl, line 2: has no token to compute a loss on"),
        (
            {"rule": "tv", "lams": [1], "tuned": "spoilt"},
            r"tensor model\.norm\.weight has NaN or infinite values in .*spoilt",
        ),
        ({"lams": [1], "out": "full"}, "full: exists and is not empty"),
        ({"lams": [1], "out": "spoilt", "tuned": "spoilt", "overwrite": True}, "spoilt: is or contains the input"),
    ],
)
def test_refusals(
    chosen: dict[str, Any], reason: str, job: Job, bad_inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bad_inputs)
    monkeypatch.setattr(estimate, "accumulate", None)
    before = fingerprint(bad_inputs, job.model.parent)
    arguments: dict[str, Any] = {role: getattr(job, role) for role in ("model", "base", "tuned", "forget", "retain")}
    with pytest.raises(InputError, match=reason):
        sweep(**(arguments | chosen), progress=False)
    assert fingerprint(bad_inputs, job.model.parent) == before


def test_experts_that_transformers_joins(text_jobs: Jobs, tmp_path: Path) -> None:
    data = text_jobs(F32)
    family = next(each for each in FAMILIES if each.name == "Mixtral")
    paths = [write(build(family, seed), tmp_path / str(seed)) for seed in (1, 2, 3)]
    job = Job(*paths, data.forget, data.retain)
    made = importances(job, tmp_path, "fisher")
    apply(*paths, *made, lam=3, out=tmp_path / "out", progress=False)
    found = run(job, *made, rule="fisher", lams=[3, 2])
    assert losses(found.rows[0]) == pytest.approx(scores(job.model, F32), rel=1e-6)
    assert losses(found.rows[-1]) == pytest.approx(scores(tmp_path / "out", F32), rel=1e-6)
    assert found.rows[-1].changed == share_changed(tmp_path / "out", job.model)


def test_an_adapter_as_tuned(text_jobs: Jobs, tmp_path: Path) -> None:
    data = text_jobs(F32)
    adapter = make_adapter(tmp_path, llama, {"target_modules": ["q_proj", "up_proj"]})
    for name in ("model", "base"):
        tokenizer().save_pretrained(tmp_path / name)
    job = Job(tmp_path / "model", tmp_path / "base", adapter, data.forget, data.retain)
    made = importances(job, tmp_path, "grad")
    found = run(job, *made, rule="grad", lams=[9], select="closest", gold=job.model, out=tmp_path / "found")
    apply(*job.checkpoints, *made, rule="grad", lam=9, out=tmp_path / "out", progress=False)
    assert losses(found.rows[-1]) == pytest.approx(scores(tmp_path / "out", F32), rel=1e-6)
    assert found.rows[-1].changed == share_changed(tmp_path / "out", job.model) > 0


# The command.


def arguments_of(job: Job, *more: object) -> list[str]:
    model, base, tuned = job.checkpoints
    paths = ["--model", model, "--base", base, "--tuned", tuned, "--forget", job.forget, "--retain", job.retain]
    return [str(each) for each in ["sweep", *paths, *more]]


@pytest.mark.parametrize("way", ["unlearn", "apply", "tv", "preconditioned"])
def test_the_command_that_is_printed_makes_what_was_scored(
    way: str, text_jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = text_jobs(BF16)
    more: list[object] = ["--max-retain-increase", "20%", "--batch-size", 1, "--rule", "grad", "--p", 2]
    if way == "unlearn":
        more += ["--at", "model", "--alpha", 0.5, "--dtype", "float32"]
    elif way == "apply":
        forget, retain = importances(job, tmp_path, "grad")
        more += ["--forget-importance", forget, "--retain-importance", retain, "--threshold", 0.3]
    elif way == "preconditioned":
        more[-4:] = ["--mus", "3,30", "--dtype", "float32"]
    else:
        more[-4:] = ["--rule", "tv", "--dtype", "float32"]
    assert cli.main(arguments_of(job, *more, "--out", tmp_path / "figures")) == 0
    printed = capsys.readouterr().out.splitlines()
    command = next(line for line in printed if line.startswith("perta "))
    assert printed[-1] == f"written to {tmp_path / 'figures'}"
    program, *arguments = shlex.split(command)
    assert (program, arguments[0]) == ("perta", "unlearn" if way in ("unlearn", "preconditioned") else "apply")
    assert arguments[-1] == "DIR"
    assert cli.main([*arguments[:-1], str(tmp_path / "out"), "--quiet"]) == 0
    content = json.loads((tmp_path / "figures" / "sweep.json").read_text())
    best = content["best"]
    run_in = F32 if "float32" in more else taken(BF16)
    assert (best["forget_loss"], best["retain_loss"]) == pytest.approx(scores(tmp_path / "out", run_in), rel=1e-6)


def test_the_table(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments_of(job, "--lams", "2,0.5")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rule", "lambda", "forget", "loss", "retain", "loss", "changed", "seconds"]
    rows = run(job, lams=[0.5, 2]).rows
    assert [line.split()[:4] for line in lines[1:4]] == [
        [row.rule or "original", f"{row.lam:g}", f"{row.forget_loss:.4f}", f"{row.retain_loss:.4f}"] for row in rows
    ]
    assert lines[4] == "Write the one you choose, L, with:"
    assert lines[5].startswith("perta unlearn ") and lines[5].endswith(" --lam L --out DIR")
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--retain-floor", "1", "--target-retain-loss", "2"], "not allowed with argument --retain-floor"),
        (["--lams", "1", "--rule", "tv", "--rules", "tv,grad"], "not allowed with argument --rule"),
        (["--lams", "1", "--mu", "1", "--mus", "1,2"], "not allowed with argument --mu"),
        (["--lams", "1", "--alphas", "1,x"], "argument --alphas: '1,x' is not a list of numbers"),
        (["--lams", "a,b"], "argument --lams: 'a,b' is not a list of numbers like 0.5,1,2"),
        (["--lams", ""], "argument --lams: '' is not a list of numbers"),
        (["--lams", "1,,2"], "argument --lams: '1,,2' is not a list of numbers"),
        (["--max-retain-increase", "much"], "argument --max-retain-increase: 'much' is not a number of percent"),
    ],
)
def test_arguments_that_cannot_be_read(
    more: list[str], words: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments_of(job, *more))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "give --lams, or a bound up to which to search"),
        (["--lams", "1", "--rules", "tv,"], "rule is ''; it must be one of preconditioned, tv, grad"),
        (["--lams", "1,nan"], "lams has nan; each must be a finite number"),
        (["--lams", "1,2,1"], "lams has 1 twice"),
        (["--max-retain-increase=-5"], "--max-retain-increase is -5.0"),
        (["--max-retain-rise=-5"], "--max-retain-rise is -5.0"),
        (["--target-retain-loss", "0.5"], "breaks the limit of 0.5 on that already"),
        (["--lams", "1", "--rule", "tv", "--p", "2"], "rule tv has no weights"),
    ],
)
def test_arguments_that_cannot_be_used(
    more: list[str], words: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments_of(job, *more, "--out", tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("perta: error: ") and words in last
    assert list(tmp_path.iterdir()) == []


def test_a_ratio_serves_the_rules_of_its_estimator(text_jobs: Jobs, tmp_path: Path) -> None:
    """Each setting scores what ``apply`` writes with the ratio; the chosen checkpoint is that, and is verified."""
    job = text_jobs(BF16)
    pair = [estimate_importance(job.base, data, out=tmp_path / name, progress=False) for name, data in data_of(job)]
    ratio = ImportanceRatio.of(*pair)
    ratio.save(tmp_path / "ratio")
    how: dict[str, Any] = {"rule": ["grad", "fisher"], "alpha": [1.0, 4.0], "lams": [1.5]}
    bound: dict[str, Any] = {"max_retain_rise": 9.0, "checkpoint": tmp_path / "chosen", "out": tmp_path / "settings"}
    found = run(job, importance=tmp_path / "ratio", **how, **bound)
    assert found.importance == {"grad": dict(ratio.metadata)}
    assert found.inputs["ratio"] == str(tmp_path / "ratio")
    for number, row in enumerate(row for row in found.rows if row.rule):
        out = tmp_path / f"out-{number}"
        settings: dict[str, Any] = {"rule": row.rule, "lam": row.lam, "p": row.p, "alpha": row.alpha, "out": out}
        apply(*job.checkpoints, importance=tmp_path / "ratio", progress=False, **settings)
        assert losses(row) == pytest.approx(scores(out, taken(BF16)), rel=1e-5)
    assert not verify(tmp_path / "chosen", full=True, progress=False).problems
    same = run(job, importance=tmp_path, **how)  # which holds both importances, and no ratio of its own
    by_pair = run(job, tmp_path / "forget", tmp_path / "retain", **how)
    assert [losses(row) for row in same.rows] == [losses(row) for row in by_pair.rows]


def data_of(job: Job) -> list[tuple[str, Path]]:
    return [("forget", job.forget), ("retain", job.retain)]


def test_the_command_that_writes_the_choice_names_the_ratio(
    text_jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = text_jobs(F32)
    for name, data in data_of(job):
        estimate_importance(job.base, data, out=tmp_path / name, progress=False)
    ImportanceRatio.of(tmp_path / "forget", tmp_path / "retain").save(tmp_path / "ratio")
    names = zip(("model", "base", "tuned", "forget", "retain"), (*job.checkpoints, job.forget, job.retain), strict=True)
    words = [word for name, path in names for word in (f"--{name}", str(path))]
    given = ["--importance", str(tmp_path / "ratio"), "--rule", "grad", "--lams", "1.5"]
    assert cli.main(["sweep", *words, *given]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:2] == ["perta", "apply"]
    assert command[command.index("--importance") + 1] == str(tmp_path / "ratio")


def test_a_second_directory_for_an_estimator_is_refused(text_jobs: Jobs, tmp_path: Path) -> None:
    job = text_jobs(F32)
    for name, data in data_of(job):
        estimate_importance(job.base, data, out=tmp_path / name, progress=False)
    ImportanceRatio.of(tmp_path / "forget", tmp_path / "retain").save(tmp_path / "ratio")
    given = [tmp_path / "ratio", tmp_path]
    with pytest.raises(InputError, match=f"{tmp_path}: another importance of estimator grad was given already"):
        run(job, importance=given, rule="grad", lams=[1.0])
    with pytest.raises(InputError, match="rule preconditioned, which is the default, takes no importance"):
        run(job, importance=given[0], lams=[1.0])
