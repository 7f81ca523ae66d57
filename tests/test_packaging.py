"""What a source distribution and a wheel hold, and the one version. `make wheel-check` builds and runs them."""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import perta_fast
from perta_fast import cli
from tests.support.children import run_child

ROOT = Path(__file__).resolve().parent.parent


def setup(*commands: object) -> None:
    done = run_child([sys.executable, "setup.py", "--quiet", *commands], cwd=ROOT)
    assert done.returncode == 0, done.stderr


def files(folder: Path) -> set[Path]:
    """Every file below that is not made by running or building."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in found if path.suffix not in (".pyc", ".so")}


def test_a_source_distribution_holds_every_room(tmp_path: Path) -> None:
    setup("egg_info", "--egg-base", tmp_path)
    listed = set(map(Path, (tmp_path / "perta_fast.egg-info" / "SOURCES.txt").read_text().splitlines()))
    for room in ("csrc", "kernels", "perta_fast", "tests", "bench", "docs", "examples"):
        assert {room / path for path in files(ROOT / room)} - listed == set()
    for name in (
        "Makefile",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "setup.py",
        ".ci/run",
    ):
        assert Path(name) in listed


def test_a_wheel_holds_every_module(tmp_path: Path) -> None:
    setup("egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "wheel")
    kernels = {"kernels" / path for path in files(ROOT / "kernels")}
    assert files(tmp_path / "wheel" / "perta_fast") == files(ROOT / "perta_fast") | kernels


def test_there_is_one_version(capsys: pytest.CaptureFixture[str]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert metadata.version("perta-fast") == perta_fast.__version__ == version
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"perta {version}\n"
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].split()[1] == version
