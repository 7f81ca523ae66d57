"""Damage to one value of a JSON document, for hypothesis."""

import copy
from typing import Any

from hypothesis import strategies as st

any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=300)
    | st.sampled_from(["", "..", "a/b", "\0", "\ud800", "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def damaged(draw: st.DrawFn, content: Any) -> Any:
    """A copy of ``content`` in which one value, at any depth, is replaced, removed or added."""
    content = copy.deepcopy(content)
    container = content
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if not keys:
            return draw(any_json)
        key = draw(st.sampled_from(keys))
        if not isinstance(container[key], dict | list) or draw(st.integers(0, 3)) == 0:
            break
        container = container[key]
    action = draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "remove":
        del container[key]
    elif action == "add" and isinstance(container, dict):
        container[draw(st.text(max_size=8))] = draw(any_json)
    else:
        container[key] = draw(any_json)
    return content
