"""Versions as the package index knows them, read without parsing all of the metadata."""

from importlib import metadata

import pytest

from perta_fast.records.versions import installed_version, installed_versions


def test_all_that_is_installed() -> None:
    names = {name for each in metadata.distributions() if (name := each.metadata["Name"]) is not None}
    assert {"numpy", "torch", "perta-fast"} <= {name.lower().replace("_", "-") for name in names}
    for name in names:
        assert installed_version(name) == metadata.version(name)


def test_what_is_not_installed_has_no_version() -> None:
    assert installed_version("no-such-package") == ""
    assert "no-such-package" not in installed_versions("no-such-package")


def test_metadata_in_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an egg has it: then the library finds the version."""
    read = metadata.Distribution.read_text
    monkeypatch.setattr(
        metadata.PathDistribution, "read_text", lambda found, name: None if name == "METADATA" else read(found, name)
    )
    monkeypatch.setattr(metadata.Distribution, "version", property(lambda _: "1.2"))
    installed_version.cache_clear()
    assert installed_version("numpy") == "1.2"
    installed_version.cache_clear()
