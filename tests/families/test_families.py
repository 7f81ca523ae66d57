"""Every family of the matrix: estimated in memory and streamed, unlearned, and loaded again by transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from perta_fast import apply, estimate_importance, unlearn
from perta_fast.rules import ESTIMATORS
from tests.families.configs import FAMILIES, Family
from tests.families.matrix import DATA, Row, build, by_autograd, measure, write
from tests.support.checkpoints import read_checkpoint
from tests.support.models import FORGET, RETAIN, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture(scope="module")
def others(row: Row, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and tuned of a family."""
    folder = tmp_path_factory.mktemp("others")
    base, tuned = (write(build(row.family, seed), folder / name) for seed, name in ((4, "base"), (5, "tuned")))
    return base, tuned


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Row:
    family: Family = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(family, tmp_path_factory.mktemp("family"))
    finally:
        torch.set_num_threads(before)


def test_in_memory_equals_autograd(row: Row, tmp_path: Path) -> None:
    """To 1e-5 in float32; some biases have no gradient but rounding (OPT's keys)."""
    exact = by_autograd(row.model, DATA["ragged"], tmp_path)
    buffers = dict(row.model.named_buffers())
    for each in row.compared:
        if each.data == "ragged":
            expected = exact[each.estimator]
            assert each.memory.tensors.keys() == expected.keys() - buffers.keys()
            norms = {name: float(tensor.norm()) for name, tensor in expected.items()}
            for name, tensor in each.memory.tensors.items():
                least = 1e-6 * max(norms.values()) if norms[name] < 1e-12 else 0.0
                error = float((tensor - expected[name]).norm())
                assert error <= 1e-5 * norms[name] + least, (each.estimator, name)


def test_streamed_equals_in_memory(row: Row, tmp_path: Path) -> None:
    assert {each.estimator for each in row.compared} == set(ESTIMATORS)
    assert_streamed(row, tmp_path)


@pytest.mark.parametrize("name", ["Llama", "Mistral, sliding window", "Qwen3", "Gemma 3 (text)", "OPT"])
def test_eager_attention(name: str, tmp_path: Path) -> None:
    """The other attention of families that are run with PyTorch's own by default; it takes masks of numbers."""
    family = next(each for each in FAMILIES if each.name == name)
    assert_streamed(measure(family, tmp_path, "eager"), tmp_path / "exact")


@pytest.mark.parametrize("name", ["Llama", "DeepSeek-V2"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """DeepSeek's routers stay in float32."""
    model = build(next(each for each in FAMILIES if each.name == name), 3).bfloat16()
    folder = write(model, tmp_path / "model")
    for estimator in ESTIMATORS:
        memory, stream = (
            estimate_importance(folder, DATA["even"], estimator, out=tmp_path / name, stream=way, progress=False)
            for name, way in ((f"{estimator} memory", False), (f"{estimator} stream", True))
        )
        assert list(memory.tensors) == list(stream.tensors)
        for key, tensor in memory.tensors.items():
            assert torch.equal(tensor, stream.tensors[key]), (estimator, key)


def assert_streamed(row: Row, folder: Path) -> None:
    """Equal to the last bit, but where sums are taken in another order.

    There to 1e-6. Some processors round a router's sums worse than that: then by at most four times what the
    importance in memory is off the one in float64, to which the streamed one is held as well.
    """
    for each in row.compared:
        assert list(each.stream.tensors) == list(each.memory.tensors)
        assert each.stream.metadata == each.memory.metadata
        reordered = {row.tied, *each.memory.metadata.one_by_one.split(", ")}
        if (each.estimator, each.data) not in row.family.rounded:
            assert each.differences.keys() <= reordered, (each.estimator, each.data)
        for name, difference in each.differences.items():
            if difference > 1e-6:
                exact = by_autograd(row.model, DATA[each.data], folder)[each.estimator][name]
                stream, memory = (
                    float((found.tensors[name] - exact).norm() / exact.norm()) for found in (each.stream, each.memory)
                )
                assert difference <= 4 * memory, (each.estimator, each.data, name)
                assert stream <= 1e-5, (each.estimator, each.data, name)


def test_apply(row: Row, others: tuple[Path, Path], tmp_path: Path) -> None:
    """The formula in plain torch on every tensor, and a result that transformers takes whole."""
    base, tuned = others
    forget, retain = (each.stream for each in row.compared if each.estimator == "grad")
    assert forget.directory is not None and retain.directory is not None
    places = (row.folder, base, tuned, forget.directory, retain.directory)
    apply(*places, rule="grad", lam=0.7, out=tmp_path / "out", progress=False)
    theta, start, end, found = map(read_checkpoint, (row.folder, base, tuned, tmp_path / "out"))
    assert found.keys() == theta.keys()
    for name, tensor in found.items():
        expected = theta[name]
        if name in forget.tensors:
            least = torch.finfo(torch.float32).tiny
            f, r = forget.tensors[name].abs(), retain.tensors[name].abs()
            weights = f / (f + r).clamp(min=least)
            expected = expected - 0.7 * weights * (end[name] - start[name])
            assert not f.any() or not torch.equal(tensor, theta[name]), name
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert bool(torch.isfinite(model(input_ids=torch.tensor([[3, 1, 2]])).logits).all())


def test_unlearn_streamed(row: Row, others: tuple[Path, Path], tmp_path: Path) -> None:
    data = [write_lines(tmp_path / f"{k}.jsonl", rows[:3]) for k, rows in enumerate((FORGET, RETAIN))]
    for name, stream in (("memory", False), ("stream", True)):
        unlearn(
            *(row.folder, *others, *data), out=tmp_path / name, stream=stream, rule="fisher", lam=1.0, check=False,
            progress=False,
        )  # fmt: skip
    expected, found = (read_checkpoint(tmp_path / name) for name in ("memory", "stream"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_page_lists_every_family() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert rows[1:] == [family.name for family in FAMILIES]
