"""What a source distribution and a wheel hold, and the one version. `make wheel-check` builds and runs them."""

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import perta_fast
from perta_fast import cli
from tests.support.children import run_child

ROOT = Path(__file__).resolve().parent.parent
RUNTIME_EXTRAS = ("data", "plots", "eval", "tune", "triton")


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


def test_the_lowest_versions_tested_are_those_declared() -> None:
    """Of what the package and its tests import; torch is the one that all tests run with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    runtime = [*project["dependencies"], *(line for name in RUNTIME_EXTRAS for line in extras[name])]
    wanted = lowest(runtime)
    assert wanted.keys() == {Requirement(line).name for line in runtime}  # each has a lower bound
    shared = {name: version for name, version in lowest(extras["dev"]).items() if name in wanted}
    assert shared == {name: wanted[name] for name in shared}
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    tested = lowest(line for line in lines if not line.startswith("#"))
    del wanted["torch"]
    assert tested == wanted | {name: lowest(extras["dev"])[name] for name in ("datasets", "pandas")}


def lowest(lines: Iterable[str]) -> dict[str, Version]:
    """The version of each requirement that has a lower bound or is exact."""
    requirements = [Requirement(line) for line in lines]
    bounds = [(entry.name, bound) for entry in requirements for bound in entry.specifier]
    return {name: Version(bound.version) for name, bound in bounds if bound.operator in (">=", "==")}


def test_the_container_is_built_from_what_the_wheel_needs_with_the_torch_of_the_makefile() -> None:
    """No engine runs here: what can be held without one."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r"torch==(\S+)", dockerfile)) == set(
        re.findall(r"torch==(\S+)", (ROOT / "Makefile").read_text())
    )
    kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert {"csrc", "kernels", "perta_fast", "pyproject.toml", "setup.py", "README.md", "LICENSE"} == set(kept)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (taken,) = re.findall(r"\.whl\)\[([a-z,]+)\]", dockerfile)
    assert set(taken.split(",")) <= extras.keys()


def test_the_citation_file_is_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert {"type", "title", "authors", "year", "url"} <= citation["preferred-citation"].keys()
