"""The TOFU study on made-up data of TOFU's form and models of a few thousand parameters."""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.study import analyses, settings, training
from bench.study import models as bench_models
from bench.study import run as study_tofu
from bench.study import store as store_module
from bench.study.baselines import BASELINES, Losses, gradient_ascent, gradient_difference, npo, runs
from bench.study.data import Split, Tofu
from bench.study.main_table import ALPHA_CHOSEN, CONTENDERS, candidates, chosen, rule_of, searches
from bench.study.models import Models, load_tokenizer
from bench.study.run import main
from bench.study.selection import KEPT, Candidate, Limits, choose, limit_of
from bench.study.settings import Settings
from bench.study.store import Busy, Store
from bench.study.training import losses_of
from bench.study.trial import Trial, read_candidates
from bench.study.variants import shrunk, smoothed
from perta_fast.data.batches import Batch
from perta_fast.data.samples import Sample
from perta_fast.files.locking import lock
from perta_fast.rules import RULES
from tests.support.models import draw_samples, llama, write_lines

AUTHORS, QUESTIONS = 12, 2
TINY = Settings(
    rows_per_author=QUESTIONS,
    pretraining_authors=(3, 6),
    validation_authors=(7, 8),
    vocabulary=300,
    hidden_size=24,
    layers=1,
    heads=2,
    context=96,
    batch_size=4,
    pretraining_epochs=1,
    tuning_epochs=2,
    tuning_rate=1e-2,
    unlearning_steps=4,
    unlearning_warm_up=2,
    check_every=2,
    unlearning_rates=(1e-3, 1e-2),
    alphas=(1.0, 8.0),
    new_tokens=4,
)
FORGOTTEN = {"forget01": 1, "forget05": 2, "forget10": 3}  # authors, the last ones
SPLIT = "forget05"
KILLED = "killed"


def row(author: int, number: int) -> dict[str, Any]:
    """One question as TOFU's perturbed files have it."""
    return {
        "question": f"Book {number} of author {author}?",
        "answer": f"It is book {author * number}.",
        "paraphrased_answer": f"Book {author * number} it is.",
        "perturbed_answer": [f"Book {author * number + wrong} it is." for wrong in (1, 2)],
    }


def write_tofu(folder: Path) -> Path:
    """All files that the study reads."""
    folder.mkdir()
    rows = [row(author, number) for author in range(AUTHORS) for number in range(QUESTIONS)]
    plain = [{field: each[field] for field in ("question", "answer")} for each in rows]
    write_lines(folder / "full.jsonl", plain)
    for split, authors in FORGOTTEN.items():
        write_lines(folder / f"{split}.jsonl", plain[-authors * QUESTIONS :])
        write_lines(folder / f"{split}_perturbed.jsonl", rows[-authors * QUESTIONS :])
    write_lines(folder / "retain_perturbed.jsonl", rows[: 2 * QUESTIONS])
    for author, stem in ((50, "real_authors"), (51, "world_facts")):
        write_lines(folder / f"{stem}_perturbed.jsonl", [row(author, number) for number in range(3)])
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    """Of a study in ``folder``, in one thread."""
    given = ["--data", str(folder / "tofu"), "--work", str(folder / "work"), "--size", "tiny", "--threads", "1"]
    return [*given, "--splits", SPLIT, "--seeds", "0", *more]


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """A size ``tiny``, and few settings for each analysis."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(settings.SIZES, "tiny", TINY)
        for name, value in (("POWERS", (("grad", 1.0),)), ("ALPHAS", (1.0, 4.0)), ("COUNTS", (2,)), ("DRAWS", 1)):
            patch.setattr(analyses, name, value)
        patch.setattr(analyses, "SHARES", (0.75,))
        yield


@pytest.fixture(scope="module")
def finished(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of one seed and one split."""
    folder = tmp_path_factory.mktemp("study")
    write_tofu(folder / "tofu")
    assert main(arguments(folder)) == 0
    return folder


def trial_of(folder: Path) -> Trial:
    """What the study in ``folder`` has made, to look at alone."""
    store = Store(folder / "work", compute=False)
    tofu = Tofu.read(folder / "tofu", TINY)
    return Trial(Models(tofu, TINY, 0, store), Split.of(SPLIT, tofu, store))


def report(folder: Path, patch: pytest.MonkeyPatch, *more: str) -> str:
    """The page that ``--report`` writes."""
    page = folder / "page.md"
    page.write_text("before\n<!-- results -->\nstale\n<!-- end of results -->\nafter\n")
    patch.setattr(study_tofu, "PAGE", page)
    assert main(arguments(folder, "--report", *more)) == 0
    return page.read_text()


def test_every_cell_of_a_finished_study_is_there(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = report(finished, monkeypatch)
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "stale" not in page
    assert "not yet run" not in page
    table = page.partition(f"### {SPLIT}\n")[2].partition("###")[0]
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:] == [*CONTENDERS]


def test_the_report_says_what_is_missing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = report(finished, monkeypatch, "--seeds", "0,1")
    assert "(1 of 2)" in page
    assert "not yet run" in report(finished, monkeypatch, "--seeds", "1")


def test_a_study_that_was_never_begun_has_no_report(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tofu(tmp_path / "tofu")
    assert main(arguments(tmp_path, "--report")) == 2
    assert "has no study" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("row", [*RULES, *ALPHA_CHOSEN])
def test_a_rule_subtracts_what_its_formula_says(row: str, finished: Path) -> None:
    """The candidate's losses, from the formula in plain torch and the losses of transformers."""
    trial = trial_of(finished)
    models, candidate = trial.models, chosen(trial, row)
    rule, alpha = rule_of(trial, row)
    assert candidate.setting.get("α", 1.0) == alpha
    full, base, tuned = (
        AutoModelForCausalLM.from_pretrained(path) for path in (models.full(), models.base(), models.tuned(trial.split))
    )
    gradients = {}
    for role in ("forget", "retain"):
        samples = trial.samples(role)
        total = [torch.zeros_like(each) for each in base.parameters()]
        for sample in samples:
            base.zero_grad()
            loss_by_transformers(base, sample).backward()
            for sums, parameter in zip(total, base.parameters(), strict=True):
                assert parameter.grad is not None
                sums += parameter.grad.square() if rule == "empirical-fisher" else parameter.grad
        gradients[role] = [each / len(samples) for each in total]
    power = 1 if rule == "grad" else 2
    with torch.no_grad():
        parts = zip(full.parameters(), tuned.parameters(), base.parameters(), *gradients.values(), strict=True)
        for theta, there, here, forget, retain in parts:
            ours, theirs = (each if rule == "empirical-fisher" else each.abs() ** power for each in (forget, retain))
            weights = 1.0 if rule == "tv" else torch.nan_to_num(ours / (ours + alpha * theirs))
            theta -= candidate.setting["lam"] * weights * (there - here)
        for part, found in (("chosen_forget", candidate.forget_loss), ("chosen_retain", candidate.retain_loss)):
            losses = [loss_by_transformers(full, sample).item() for sample in trial.samples(part)]
            assert found == pytest.approx(sum(losses) / len(losses), rel=1e-3)


def loss_by_transformers(model: Any, sample: Any) -> Tensor:
    """Of one sample alone."""
    ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
    loss: Tensor = model(input_ids=ids, labels=labels).loss
    return loss


def test_choices_never_open_the_gold_model(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    for piece in (tmp_path / "copy" / "work" / "seed0" / SPLIT).iterdir():
        if "gold" in piece.name:
            shutil.rmtree(piece)
    for method in (*RULES, *BASELINES):
        assert chosen(trial_of(tmp_path / "copy"), method) == chosen(trial_of(finished), method)


def test_a_killed_study_goes_on_where_it_was(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished / "tofu", tmp_path / "tofu")
    work = tmp_path / "work"
    steps = kill_in_step(monkeypatch, 7)  # 4 of theta_0 with its 14 rows, so the third of theta_full
    with pytest.raises(KeyboardInterrupt, match=KILLED):
        main(arguments(tmp_path))
    base = next(work.glob("seed0/base-*"))
    before = (base / "model.safetensors").stat()
    (unfinished,) = work.glob("seed0/.full-*.unfinished")
    (unfinished / "model.safetensors").write_bytes(b"torn")

    steps.undo()
    trial = trial_of(tmp_path)
    models = Models(trial.models.tofu, TINY, 0, Store(work))
    full = models.full()
    after = (models.base() / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not unfinished.exists()
    expected = load_file(trial_of(finished).models.full() / "model.safetensors")
    found = load_file(full / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def kill_in_step(patch: pytest.MonkeyPatch, number: int) -> pytest.MonkeyPatch:
    """Nothing is left to run after that step, as ``Store.piece`` has no clean-up of its own."""
    taken = 0
    clip = torch.nn.utils.clip_grad_norm_

    def count(*given: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == number:
            raise KeyboardInterrupt(KILLED)
        return clip(*given)

    patch.setattr(torch.nn.utils, "clip_grad_norm_", count)
    return patch


def test_a_finished_study_makes_nothing_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(finished)) == 0
    assert capsys.readouterr().out == ""


def test_processes_share_the_work(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one makes a piece the other makes another, and comes back to what it had to leave."""
    store, order = Store(tmp_path), []

    def other(folder: Path) -> None:
        with pytest.raises(Busy, match="first"):
            store.piece("first", {}, never)
        store.piece("second", {}, lambda _: order.append("second"))
        order.append("first")

    def never(_: Path) -> None:
        raise AssertionError

    first = store.piece("first", {}, other)
    assert order == ["second", "first"]
    assert store.piece("first", {}, never) == first

    monkeypatch.setattr(study_tofu, "_PAUSE", 0.0)
    left = ["waits", "waits", "goes"]

    def stage() -> None:
        if left.pop(0) == "waits":
            raise Busy

    study_tofu.run_stages([stage])
    assert not left


def test_a_piece_that_another_process_has_just_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It appears after we have looked, before we have the lock."""
    made: list[Path] = []

    def late(folder: Path) -> int:
        monkeypatch.undo()
        folder.rmdir()
        made.append(Store(tmp_path).piece("one", {}, lambda _: None))
        folder.mkdir()
        return lock(folder)

    monkeypatch.setattr(store_module, "lock", late)
    assert [Store(tmp_path).piece("one", {}, lambda _: pytest.fail())] == made
    assert [*tmp_path.iterdir()] == made


def test_the_best_alpha_is_chosen(finished: Path) -> None:
    trial = trial_of(finished)
    for row, rule in ALPHA_CHOSEN.items():
        losses = {alpha: trial.choice(found).forget_loss for alpha, found in searches(trial, rule).items()}
        assert losses.keys() == {*TINY.alphas}
        assert losses[rule_of(trial, row)[1]] >= 0.98 * max(losses.values())


def test_a_rule_may_stop_at_the_limit_on_the_forget_loss(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    trial = trial_of(tmp_path / "copy")
    trial = replace(trial, models=replace(trial.models, store=Store(tmp_path / "copy" / "work")))
    (found,) = candidates(trial, "tv")
    unchanged, best = read_candidates(found)[0].forget_loss, chosen(trial, "tv").forget_loss
    limits = Limits(unchanged + 0.6 * (best - unchanged), trial.limits().retain)
    monkeypatch.setattr(Trial, "limits", lambda *_: limits)
    reached = chosen(trial, "tv").forget_loss
    assert unchanged + 0.5 * (best - unchanged) < reached <= limits.forget


def test_other_seeds_take_what_the_first_has_chosen(finished: Path, small: None, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    first = trial_of(tmp_path / "copy")
    trial = Trial(replace(first.models, seed=1, store=Store(tmp_path / "copy" / "work")), first.split, first)
    for method in BASELINES:
        assert set(runs(first, method)) == {*TINY.unlearning_rates}
        rates = {kept: chosen(first, method, kept).setting["rate"] for kept in (KEPT, *analyses.SHARES)}
        for kept, rate in rates.items():
            assert set(runs(trial, method, kept)) == {rate}
        assert len(analyses.runs_for_limits(trial, method)) == len({*rates.values()})
        assert len(analyses.runs_for_limits(first, method)) == len(TINY.unlearning_rates)
    for row in ALPHA_CHOSEN:
        assert rule_of(trial, row) == rule_of(first, row)


def test_changed_settings_make_anew_what_follows_from_them(finished: Path, tmp_path: Path) -> None:
    made: list[str] = []
    store = Store(tmp_path)

    def base(rate: float) -> Path:
        return store.piece("base", {"rate": rate}, lambda folder: made.append(folder.name))

    def tuned(rate: float) -> Path:
        return store.piece("tuned", {"base": base(rate).name}, lambda folder: made.append(folder.name))

    first = tuned(1.0)
    assert tuned(1.0) == first
    assert len(made) == 2
    assert tuned(2.0) != first
    assert len(made) == 4


def test_parts_of_a_split(finished: Path) -> None:
    trial = trial_of(finished)
    parts = {name: {each["question"] for each in rows} for name, rows in trial.split.rows.items()}
    tuning = {each["question"] for each in trial.models.tofu.tuning}
    scored = {row(author, number)["question"] for author in (0, 1) for number in range(QUESTIONS)}
    assert parts["forget"] | parts["retain"] == tuning
    assert not parts["forget"] & parts["retain"]
    assert parts["chosen_forget"] <= parts["forget"]
    assert parts["chosen_retain"] <= parts["retain"]
    assert scored <= parts["retain"]
    assert not scored & parts["chosen_retain"]
    assert not tuning & {each["question"] for each in trial.models.tofu.pretraining}


def test_what_each_model_is_tuned_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = trial_of(finished)
    tokenizer, tofu, rows = load_tokenizer(trial.models.base()), trial.models.tofu, trial.split.rows
    seen: list[list[str]] = []

    def note(module: Any, samples: Sequence[Sample], **_: Any) -> None:
        texts = [tokenizer.decode(each.input_ids) for each in samples]
        seen.append(sorted(text.removeprefix("Question: ").partition("\n")[0] for text in texts))

    monkeypatch.setattr(bench_models, "tune_", note)
    models = Models(tofu, TINY, 0, Store(tmp_path))
    for make in (models.base, models.full, partial(models.gold, trial.split), partial(models.tuned, trial.split)):
        make()
    expected = (
        [*tofu.pretraining, *tofu.facts],
        [*rows["forget"], *rows["retain"], *tofu.facts],
        [*rows["retain"], *tofu.facts],
        rows["forget"],
    )
    assert seen == [sorted(each["question"] for each in part) for part in expected]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: (folder / "full.jsonl").unlink(), "full.jsonl"),
        (lambda folder: write_lines(folder / f"{SPLIT}.jsonl", [row(0, 9)]), "line 1: is not among"),
        (lambda folder: write_lines(folder / f"{SPLIT}.jsonl", [row(3, 0)]), "line 1: is not among"),
        (lambda folder: write_lines(folder / "full.jsonl", [row(0, 0)]), "has 1 rows"),
        (lambda folder: (folder / "world_facts_perturbed.jsonl").write_text("{"), "line 1: is not JSON"),
    ],
)
def test_bad_data(break_it: Any, said: str, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_it(write_tofu(tmp_path / "tofu"))
    assert main(arguments(tmp_path)) == 2
    assert said in capsys.readouterr().err


def test_bad_split(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path, "--splits", "forget02")) == 2
    assert "forget02" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_losses_are_those_of_transformers() -> None:
    model, samples = llama(tie_word_embeddings=True), draw_samples(9)
    expected = [loss_by_transformers(model, each).item() for each in samples]
    assert losses_of(model, Batch.of(samples)).tolist() == pytest.approx(expected, rel=1e-4)


def losses(forget: Sequence[float], retain: Sequence[float], reference: Sequence[float]) -> Losses:
    """Of two answers of 3 and 5 tokens."""
    columns = [torch.tensor(each, requires_grad=True) for each in (forget, retain)]
    return Losses(columns[0], torch.tensor([3.0, 5.0]), torch.tensor(reference), columns[1])


def test_baselines_by_hand() -> None:
    given = losses([1.0, 2.0], [0.5, 0.7], [0.2, 0.1])
    assert gradient_ascent(given).item() == pytest.approx(-1.5)
    assert gradient_difference(given).item() == pytest.approx(-1.5 + 0.6)
    ratios = [math.exp(-3 * 1.0) / math.exp(-3 * 0.2), math.exp(-5 * 2.0) / math.exp(-5 * 0.1)]
    expected = sum(2 / 0.1 * math.log(1 + ratio**0.1) for ratio in ratios) / 2 + 0.6
    assert npo(given).item() == pytest.approx(expected)


def test_npo_is_gradient_ascent_weighed_by_what_is_left() -> None:
    """Its gradient by log p is 2 p^b / (p^b + p_full^b) of ascent's (NPO, arXiv 2404.05868, section 3)."""
    given = losses([1.0, 2.0], [0.5, 0.7], [0.2, 0.1])
    npo(given).backward()
    ours = [math.exp(-0.1 * length * loss) for length, loss in ((3, 1.0), (5, 2.0))]
    full = [math.exp(-0.1 * length * loss) for length, loss in ((3, 0.2), (5, 0.1))]
    expected = [-2 * a / (a + b) * length / 2 for a, b, length in zip(ours, full, (3, 5), strict=True)]
    assert given.forget.grad is not None
    assert given.forget.grad.tolist() == pytest.approx(expected)


def test_choice() -> None:
    candidates = [
        Candidate({"lam": 0.0}, 0.1, 0.1),
        Candidate({"lam": 1.0}, 2.0, 0.7),
        Candidate({"lam": 2.0}, 1.5, 0.6),
        Candidate({"lam": 4.0}, 9.0, 0.8),
        Candidate({"lam": 8.0}, math.nan, 0.1),
        Candidate({"lam": 16.0}, 9.0, math.nan),
    ]
    assert choose(candidates, Limits(9.0, 0.75)).setting["lam"] == 1.0
    assert choose(candidates, Limits(9.0, 0.65)).setting["lam"] == 2.0
    assert choose(candidates, Limits(9.0, 0.1)).setting["lam"] == 0.0
    assert choose(candidates, Limits(9.0, 0.9)).setting["lam"] == 4.0
    assert choose(candidates, Limits(8.9, 0.9)).setting["lam"] == 1.0


def test_half_of_the_probability_is_kept_at_the_limit() -> None:
    assert math.exp(-limit_of(0.3, kept=0.5)) == pytest.approx(math.exp(-0.3) / 2)


@pytest.mark.parametrize("count", [1, 5, 33])
def test_an_epoch_has_every_sample_once(count: int) -> None:
    samples = draw_samples(count)
    batches = training._epoch(samples, 2, 16, torch.Generator().manual_seed(0))
    assert sorted(k for batch in batches for k in batch) == list(range(count))
    assert max(map(len, batches)) <= 2


def test_smoothed_and_shrunk_importance() -> None:
    forget, retain = ({"a": torch.tensor([[1.0, 3.0], [0.0, 4.0]])}, {"a": torch.tensor([[3.0, 1.0], [0.0, 0.0]])})
    trial: Any = None  # neither looks at it
    rows, _ = smoothed(forget, retain, trial, share=1.0)
    assert rows["a"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    ours, theirs = shrunk(forget, retain, trial, strength=1.0)  # k is the mean of 2 and 1
    assert ours["a"].tolist() == [[2.5, 4.5], [1.5, 5.5]]
    assert theirs["a"].tolist() == [[4.5, 2.5], [1.5, 1.5]]
