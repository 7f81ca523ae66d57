"""What the tests of a run's check patch: the loading of models, and the check itself."""

import weakref
from typing import Any

import pytest

from perta_fast.models import loading
from perta_fast.runs.checked_rows import Rows


def watch_loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gives weak references to the models as they are loaded; each load asserts that those before it have gone."""
    alive: list[Any] = []
    load = loading.load_subject

    def watched(*arguments: Any, **settings: Any) -> Any:
        assert not [module for module in alive if module() is not None]
        subject = load(*arguments, **settings)
        alive.append(weakref.ref(subject.module))
        return subject

    monkeypatch.setattr(loading, "load_subject", watched)
    return alive


def stop_in_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run be interrupted when its result is to be measured."""
    measure = Rows.measure

    def stopping(self: Rows, subject: Any, role: str, when: str, most: int | None = None) -> Any:
        if when == "after":
            raise KeyboardInterrupt
        return measure(self, subject, role, when, most)

    monkeypatch.setattr(Rows, "measure", stopping)
