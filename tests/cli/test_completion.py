"""``perta completion``: the script that is printed, in a shell that reads it."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from perta_fast import cli

pytest.importorskip("shtab", reason="the scripts are made by shtab")
BASH = shutil.which("bash")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("perta", "unlearn", "max-retain-rise", "recipe"))


@pytest.mark.skipif(BASH is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("unl", ["unlearn"]),
        ("unlearn --retain", ["--retain"]),
        ("apply --ru", ["--rule"]),
        ("apply --rule empirical", ["empirical-fisher"]),
        ("recipe in", ["init"]),
        ("inspect --base fol", ["folder"]),
    ],
)
def test_bash_completes(typed: str, completed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "folder").mkdir()
    words = ["perta", *typed.split()]
    asked = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}"
    last = shlex.join(["perta", words[-1], words[-2]])
    run = f'bash -n script && source ./script && {asked} && _shtab_perta {last}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run([str(BASH), "-c", run], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.split() == completed


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install 'perta-fast[completion]'" in capsys.readouterr().err
