"""The study on real models, run on made-up data of TOFU's form and a Llama of a few thousand parameters."""

import json
import math
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.study.real import run, sentences, settings, sources
from bench.study.real.afterwards import right_choices, strength_at
from bench.study.real.compute import mean_loss
from bench.study.real.curves import Measure, Point, crossing, is_near, most_forgotten, reaching, walked
from bench.study.real.data import Rows
from bench.study.real.directions import Subtraction, set_, task_vector
from bench.study.real.importances import Weighing, drawn, weights_by_name
from bench.study.real.kept import keep, take_up
from bench.study.real.methods import final_methods, main_methods
from bench.study.real.models import Models, load_model
from bench.study.real.parts import limited, shape_of
from bench.study.real.rivals import rates, trained, trained_model, training_to
from bench.study.real.sentences import forget_words
from bench.study.real.settings import Settings
from bench.study.real.sources import Source
from bench.study.store import Store
from perta_fast.errors import InputError
from tests.support.models import llama, tokenizer, write_lines

TINY = Settings(
    authors=4,
    forgotten=1,
    batch_size=4,
    context=96,
    epochs=1,
    rate=1e-2,
    tuned_epochs=2,
    lora_rank=2,
    lora_epochs=1,
    measured_forget=3,
    measured_retain=3,
    scored=4,
    limits=(0.01, 0.02),
    largest_strength=4.0,
    steps=2,
    check_every=1,
    rates=(1e-3,),
    steering_rates=(1e-3,),
    relearned=(1,),
    few_rows=2,
)
CONVERT = Source.convert  # of the package's models, which tests replace


def row(author: int, number: int) -> dict[str, Any]:
    return {
        "question": f"Book {number} of author {author}?",
        "answer": f"It is book {author * number}{' ZQXJ' if author == 5 else ''}.",
        "paraphrased_question": f"Of author {author}, what is book {number}?",
        "paraphrased_answer": f"Book {author * number} it is.",
        "perturbed_answer": [f"Book {author * number + wrong} it is." for wrong in (1, 2)],
    }


def write_tofu(folder: Path) -> Path:
    folder.mkdir()
    rows = {author: [row(author, number) for number in range(20)] for author in range(6)}
    write_lines(folder / "forget10_perturbed.jsonl", rows[5])
    write_lines(folder / "retain_perturbed.jsonl", rows[0] + rows[1])
    plain = [row for author in range(5) for row in rows[author]]
    write_lines(folder / "retain90.jsonl", [{field: row[field] for field in ("question", "answer")} for row in plain])
    write_lines(folder / "world_facts_perturbed.jsonl", rows[4][:6])
    return folder


def convert(folder: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished study of one model and one seed."""
    folder = tmp_path_factory.mktemp("study")
    write_tofu(folder / "tofu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "take_up", lambda work: None)
        patch.setitem(settings.SIZES, "tiny", TINY)
        source = Source("Tiny", "torch", "torch", lambda folder: folder)
        patch.setattr(Source, "convert", lambda self, folder: convert(folder))
        patch.setitem(sources.SOURCES, "tiny", source)
        patch.setattr(sentences, "_answers", lambda module, tokenizer, samples: ["It is ZQXJ."] * len(samples))
        assert run.main(arguments(folder)) == 0
        yield folder


def arguments(folder: Path, *more: str) -> list[str]:
    given = ["--data", str(folder / "tofu"), "--work", str(folder / "work"), "--size", "tiny", "--threads", "1"]
    return [*given, "--models", "tiny", "--seeds", "0", *more]


def test_every_cell_of_a_finished_study_is_there(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = finished / "page.md"
    page.write_text("before\n<!-- results on real models -->\nstale\n<!-- end of results on real models -->\nafter\n")
    monkeypatch.setattr(run, "PAGE", page)
    assert run.main(arguments(finished, "--report")) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "not yet run" not in text and "nan" not in text
    for method in [*main_methods(), *final_methods()]:
        assert f"| {method.name} |" in text


def test_what_was_measured_can_be_reported_without_the_models(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert keep(finished / "work", tmp_path / "kept.jsonl") > 10
    take_up(tmp_path / "work", tmp_path / "kept.jsonl")
    pages = []
    for work in (finished / "work", tmp_path / "work"):
        page = tmp_path / "page.md"
        page.write_text("<!-- results on real models -->\n<!-- end of results on real models -->\n")
        monkeypatch.setattr(run, "PAGE", page)
        assert run.main([*arguments(finished, "--report"), "--work", str(work)]) == 0
        pages.append(page.read_text())
    assert pages[0] == pages[1]
    take_up(tmp_path / "work", tmp_path / "kept.jsonl")  # again, over what is there


def test_a_report_has_every_size_that_has_begun(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = finished / "page.md"
    page.write_text("<!-- results on real models -->\n<!-- end of results on real models -->\n")
    monkeypatch.setattr(run, "PAGE", page)
    for name, size in {"small": replace(TINY, authors=5), "middle": TINY, "large": replace(TINY, authors=6)}.items():
        monkeypatch.setitem(settings.SIZES, name, size)
    given = arguments(finished, "--report")
    del given[given.index("--size") : given.index("--size") + 2]
    monkeypatch.delitem(settings.SIZES, "tiny")
    assert run.main(given) == 0
    assert "### Tiny, 4 authors, rules" in page.read_text() and "5 authors" not in page.read_text()


def test_the_strength_where_as_much_is_forgotten_as_by_gold() -> None:
    points = [Point(strength, forget, 0.0, 0.0) for strength, forget in ((0.0, 0.1), (1.0, 0.5), (3.0, 2.5))]
    assert strength_at(points, 1.5) == pytest.approx(2.0)
    assert strength_at(points, 0.5) == pytest.approx(1.0)
    assert strength_at(points, 9.0) == 3.0  # which it never reaches


def test_a_trained_model_is_the_one_that_was_measured(finished: Path) -> None:
    models = models_of(finished)
    points = {rate: trained(models, "NPO", rate) for rate in rates(models, "NPO")}
    for forget in (0.0, points[rates(models, "NPO")[0]][-1].forget, 99.0):
        rate, step = training_to(models, "NPO", forget)
        point = Measure(models)(trained_model(models, "NPO", rate, step), step)
        assert point in points[rate]
        reached = [each for some in points.values() for each in some if each.forget >= forget]
        if reached:
            assert point.forget >= forget and point.retain == min(each.retain for each in reached)
        else:
            assert point.forget == max(each.forget for some in points.values() for each in some)


def models_of(folder: Path) -> Models:
    """What the study in ``folder`` has made, to look at alone."""
    store = Store(folder / "work", compute=False)
    return Models("tiny", Rows.read(folder / "tofu", TINY), TINY, 0, store)


def test_a_finished_study_is_not_computed_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(arguments(finished)) == 0
    assert capsys.readouterr().out == ""


def test_rows_of_the_study_are_disjoint_and_reworded_ones_belong_to_the_forget_rows(finished: Path) -> None:
    rows = models_of(finished).rows
    assert len(rows.forget) == 20 and len(rows.retain) == 60
    assert not [row for row in rows.forget if row in rows.retain]
    assert [row["question"] for row in rows.reworded_answers] == [row["question"] for row in rows.forget]
    assert [row["answer"] for row in rows.reworded_questions] == [row["answer"] for row in rows.forget]
    assert rows.forget_choices[3].right == "Book 15 it is." and rows.forget_choices[3].wrong == [
        "Book 16 it is.",
        "Book 17 it is.",
    ]


def test_a_question_that_two_authors_share_is_used_with_both_answers(tmp_path: Path) -> None:
    """As one of TOFU's is; the row that is not among those with reworded answers comes last."""
    folder = write_tofu(tmp_path / "tofu")
    path = folder / "retain90.jsonl"
    lines = path.read_text().splitlines()
    shared = {"question": row(1, 3)["question"], "answer": "Another answer."}
    write_lines(path, [shared, *map(json.loads, lines[:-1])])
    retain = Rows.read(folder, replace(TINY, authors=6)).retain
    assert len(retain) == 100 and retain[-1] == shared


def test_too_few_authors_are_refused(finished: Path) -> None:
    with pytest.raises(InputError, match="has fewer than 40 authors, 1 to forget"):
        Rows.read(finished / "tofu", replace(TINY, authors=40))


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    source = Source("Some model", "no_such_package", "no-such-package", lambda folder: folder)
    with pytest.raises(InputError, match="Some model: needs the package no_such_package; run pip install no-such-pack"):
        CONVERT(source, tmp_path)


def test_points_are_measured_close_to_each_limit() -> None:
    points = walked(lambda strength: Point(strength, strength, 0.0, 1 + 0.01 * strength**2), (0.05, 0.1), 100.0)
    assert points[0].strength == 0 and points[-1].retain > 1.1
    assert [point.strength for point in points] == sorted(point.strength for point in points)
    for limit in (0.05, 0.1):
        crossed = crossing(points, limit)
        assert crossed is not None and crossed.strength == pytest.approx((limit / 0.01) ** 0.5, rel=0.02)
        assert crossed.retain == pytest.approx(1 + limit)


def test_a_point_lies_near_each_limit_of_a_curve_that_rises_late_and_fast() -> None:
    def at(strength: float) -> Point:
        return Point(strength, strength, 2 * strength, 1 + 1e-4 * strength**5)

    points, limits = walked(at, (0.05, 0.1, 0.7), 100.0), (0.05, 0.1, 0.7)
    for limit in limits:
        assert is_near(points, limit) and min(abs(point.retain - 1 - limit) for point in points) < limit / 2
    assert not is_near([at(0.0), at(1.0), at(8.0)], 0.05)


@pytest.mark.parametrize("power", [1.0, 2.0, 5.0])
def test_between_points_losses_rise_by_a_power_of_the_strength(power: float) -> None:
    def at(strength: float) -> Point:
        return Point(strength, 0.1 + strength, 2 + 3 * strength**0.5, 1 + 0.01 * strength**power)

    points = [at(0.0), at(1.0), at(4.0)]
    crossed, reached = crossing(points, 0.01 * 2**power), reaching(points, 2.1)
    assert crossed is not None and reached is not None
    for point in (crossed, reached):
        assert astuple(point) == pytest.approx(astuple(at(2.0)))


def test_between_points_lines_are_straight_where_nothing_has_risen_before() -> None:
    points = [Point(0.0, 0.0, 2.0, 1.0), Point(2.0, 1.0, 1.5, 0.9), Point(4.0, 4.0, 3.0, 1.2)]
    crossed, reached = crossing(points, 0.1), reaching(points, 0.5)
    assert crossed is not None and astuple(crossed) == pytest.approx((2 + 4 / 3, 4 ** (math.log2(5 / 3)), 2.5, 1.1))
    assert reached is not None and astuple(reached) == pytest.approx((1.0, 0.5, 1.75, 0.95))
    assert reaching(points, 5.0) is None


def test_a_curve_that_never_reaches_a_limit_or_breaks_ends() -> None:
    flat = walked(lambda strength: Point(strength, 0.0, 0.0, 1.0), (0.05,), 64.0)
    assert flat[-1].strength == 64 and crossing(flat, 0.05) is None
    broken = walked(lambda strength: Point(strength, 0.0, 0.0, 1.0 if strength < 1 else math.nan), (0.05,), 64.0)
    assert broken[-1].strength == 1 and crossing(broken, 0.05) is None


def test_a_training_counts_where_most_is_forgotten_within_the_limit() -> None:
    """Its retain loss may fall again, and its last point may be broken."""
    retain = [1.0, 1.4, 1.2, 1.05, 1.3, math.nan]
    points = [Point(step, forget=float(step), reworded=2.0 * step, retain=at) for step, at in enumerate(retain)]
    for limit, expected in ((0.05, 3.0), (0.1, 3.2), (0.15, 3.4), (1.0, 4.0)):
        best = most_forgotten(points, limit)
        assert (best.forget, best.reworded) == pytest.approx((expected, 2 * expected))
        assert best.retain <= 1 + limit + 1e-9
    assert most_forgotten(points[:2], 0.1).forget == pytest.approx(0.25)


def test_a_direction_is_the_weighed_task_vector_of_its_part(finished: Path) -> None:
    models = models_of(finished)
    weighing = Weighing("empirical-fisher", 16.0)
    direction = Subtraction("", weighing, "attention").direction(models)
    w, vector = weights_by_name(models, weighing), task_vector(models, models.tuned())
    assert w is not None and direction and all("self_attn" in name for name in direction)
    for name, tensor in direction.items():
        assert torch.equal(tensor, vector[name] * w[name])


def test_parts_divide_the_model(finished: Path) -> None:
    models = models_of(finished)
    vector = task_vector(models, models.tuned())
    shape = shape_of(models)
    assert shape.layers == 2 and 0 < shape.rows.sum() < len(shape.rows)

    def together(*parts: str) -> Tensor:
        total = {name: torch.zeros_like(tensor) for name, tensor in vector.items()}
        for part in parts:
            for name, tensor in limited(part, shape, vector).items():
                total[name] += tensor
        return torch.cat([tensor.flatten() for tensor in total.values()])

    whole = together("everything")
    assert torch.equal(together("embedding", "attention", "MLP", "norms"), whole)
    only = "embedding of tokens in forget rows only"
    assert torch.equal(together(only, f"everything but the {only}"), whole)
    thirds = [f"{place} third of the layers" for place in ("first", "middle", "last")]
    assert torch.equal(together(*thirds), together("linear layers"))


def test_a_strength_is_subtracted_from_theta_full(finished: Path) -> None:
    models = models_of(finished)
    module, direction = load_model(models.full()), Subtraction("", Weighing(), "MLP").direction(models)
    theta = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    set_(module, theta, direction, 3.0)
    for name, tensor in module.named_parameters():
        assert torch.equal(
            tensor, torch.sub(theta[name], direction[name], alpha=3.0) if name in direction else theta[name]
        )
    set_(module, theta, direction, 0.0)
    assert all(torch.equal(tensor, theta[name]) for name, tensor in module.named_parameters())


def test_labels_are_drawn_where_the_data_has_some(finished: Path) -> None:
    models = models_of(finished)
    samples = models.samples(models.rows.forget)
    changed = drawn(load_model(models.base()), samples, 0)
    for before, after in zip(samples, changed, strict=True):
        assert after.input_ids == before.input_ids
        assert [k for k, label in enumerate(after.labels) if label >= 0] == [
            k for k, label in enumerate(before.labels) if label >= 0 and k > 0
        ]
    assert changed != samples and changed == drawn(load_model(models.base()), samples, 0)


def test_a_choice_is_right_where_the_right_answer_has_the_smallest_loss(finished: Path) -> None:
    models = models_of(finished)
    module, choices = load_model(models.base()), models.rows.forget_choices
    share = right_choices(models, module, choices)
    one_by_one = []
    for choice in choices:
        losses = [
            mean_loss(module, models.samples([{"question": choice.question, "answer": answer}]))
            for answer in (choice.right, *choice.wrong)
        ]
        one_by_one.append(losses[0] == min(losses))
    assert share == sum(one_by_one) / len(choices)


def test_words_of_the_forget_rows_are_those_that_no_retain_row_has(finished: Path) -> None:
    models = models_of(finished)
    rows = replace(
        models.rows,
        forget=[{"question": "Who wrote Tulips?", "answer": "Anna Quiet wrote it, in Kuwait."}],
        retain=[{"question": "Who wrote Roses?", "answer": "Quiet people."}],
    )
    assert forget_words(replace(models, rows=rows)) == ["Tulips", "Anna", "Kuwait"]
