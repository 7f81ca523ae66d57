"""Where w is large: the share of parameters with w > 1/2, by group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.study.real.importances import Weighing, weights_by_name
from bench.study.real.models import Models
from bench.study.real.parts import ONLY_FORGET, group_of, shape_of
from bench.study.store import read_json, write_json

_FILE = "shares.json"
GROUPS = ("embedding", ONLY_FORGET, "attention", "MLP", "norms")


def shares(models: Models, weighing: Weighing) -> Mapping[str, float]:
    """The share of each group's parameters with w > 1/2: of importances at theta_0, so the same for all seeds."""

    def make(folder: Path) -> None:
        w = weights_by_name(models, weighing)
        assert w is not None
        rows = shape_of(models).rows
        large: dict[str, int] = {}
        count: dict[str, int] = {}
        for name, tensor in w.items():
            of_group = {group_of(name): tensor}
            if group_of(name) == "embedding":
                of_group[ONLY_FORGET] = tensor[rows]
            for group, some in of_group.items():
                large[group] = large.get(group, 0) + int((some > 0.5).sum())
                count[group] = count.get(group, 0) + some.numel()
        write_json(folder / _FILE, {group: large[group] / count[group] for group in large})

    made_of = {
        "base": models.store.relative(models.base(make=False)),
        "rows": models.rows.digest,
        "weighing": vars(weighing),
    }
    name = f"{models.shared_folder}/shares of {weighing.rule} α {weighing.alpha:g}"
    found: Mapping[str, float] = read_json(models.store.piece(name, made_of, make) / _FILE)
    return found
