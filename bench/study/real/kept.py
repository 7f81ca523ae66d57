"""What was measured, kept in the project: every piece without weights. A study on another machine goes on from it.

``measured.jsonl`` has a line for each piece: its path in the study, and its files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bench.study.store import read_json, write_json

KEPT = Path(__file__).with_name("measured.jsonl")
_ABOUT = "piece.json"


def take_up(work: Path, kept: Path = KEPT) -> None:
    """Write into ``work`` the pieces that it lacks."""
    for name, files in _read(kept).items():
        place = work / name
        if not place.exists():
            unfinished = place.with_name(f".{place.name}.taken")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for file, content in files.items():
                write_json(unfinished / file, content)
            unfinished.rename(place)


def keep(work: Path, kept: Path = KEPT) -> int:
    """Add what was measured in ``work``; returns how many pieces are kept now."""
    pieces = _read(kept)
    for about in work.rglob(_ABOUT):
        files = list(about.parent.iterdir())
        if all(file.suffix == ".json" for file in files) and not about.parent.name.startswith("."):
            pieces[str(about.parent.relative_to(work))] = {file.name: read_json(file) for file in sorted(files)}
    lines = [json.dumps({"piece": name, "files": pieces[name]}, ensure_ascii=False) + "\n" for name in sorted(pieces)]
    kept.write_text("".join(lines), encoding="utf-8")
    return len(pieces)


def _read(kept: Path) -> dict[str, dict[str, object]]:
    """The files of each piece, by its path."""
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    return {piece["piece"]: piece["files"] for piece in map(json.loads, lines)}
