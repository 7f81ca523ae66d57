"""The C++ alone, without Python around it, under the compiler's sanitizers."""

import os
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.children import run_child

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = {"test_elements": [], "test_operations": sorted((CSRC / "cpu").glob("*.cpp"))}


def compiler() -> str:
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        pytest.skip("no C++ compiler was found")
    return found


def build(target: Path, sources: list[Path], sanitizers: str) -> CompletedProcess[str]:
    optimised = "-O1" if sanitizers == "thread" else "-O0"  # what compiles and runs in the least time
    flags = ["-std=c++17", optimised, "-g1", "-ffp-contract=off", "-DPERTA_ISA=portable", "-fno-sanitize-recover=all"]
    command = [*compiler().split(), *flags, f"-fsanitize={sanitizers}", f"-I{CSRC}", f"-I{CSRC / 'cpu'}"]
    return run_child([*command, *sources, "-o", target, "-pthread", "-ldl"])


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_program(name: str, sanitizers: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    linked = build(tmp_path / "empty", [empty], sanitizers)
    if linked.returncode or run_child([tmp_path / "empty"]).returncode:
        pytest.skip(f"this compiler or kernel has no sanitizer for {sanitizers}")
    built = build(tmp_path / name, [HERE / f"{name}.cpp", *SOURCES[name]], sanitizers)
    assert built.returncode == 0, built.stderr
    done = run_child([tmp_path / name])
    assert done.returncode == 0, done.stderr
    assert " 0 failures" in done.stdout
