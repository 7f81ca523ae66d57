"""A damaged config.json is refused before anything is written; where no model is loaded, none is needed."""

from pathlib import Path

import pytest

from perta_fast import InputError, apply, cli
from perta_fast.checkpoints.configuration import check_configured, read_config
from tests.support.checkpoints import fingerprint
from tests.support.inputs import write_inputs

DAMAGED = {
    "[": r"config\.json: is not JSON; fetch it again",
    "": r"config\.json: is not JSON; fetch it again",
    "[]": r"config\.json: holds no table of settings; fetch it again",
    "version https://git-lfs.github.com/spec/v1\n": r"config\.json: is a pointer of git-lfs; fetch the file itself",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_configuration(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    for reads in (read_config, check_configured):
        with pytest.raises(InputError, match=DAMAGED[content]):
            reads(tmp_path)


def test_a_missing_configuration(tmp_path: Path) -> None:
    assert read_config(tmp_path) is None
    with pytest.raises(InputError, match=r"has no config\.json, without which transformers cannot load this model"):
        check_configured(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    check_configured(tmp_path)


def test_no_result_gets_a_damaged_one(tmp_path: Path) -> None:
    three = write_inputs(tmp_path).checkpoints
    for path in three:
        (path / "config.json").write_text("{")
        before = fingerprint(tmp_path)
        for place in ({"out": tmp_path / "out"}, {"in_place": True}):
            with pytest.raises(InputError, match=rf"{path.name}/config\.json: is not JSON"):
                apply(*three, rule="tv", progress=False, **place)  # type: ignore[arg-type]
        assert cli.main(["inspect", str(path)]) == 2
        assert fingerprint(tmp_path) == before
        (path / "config.json").unlink()
    apply(*three, rule="tv", out=tmp_path / "out", progress=False)
