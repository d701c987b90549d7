"""Changes to trees and bytes that benchmarks/fuzz.py makes of sound input."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1e308, -1e-320, 2**63, 10**30, math.nan, math.inf, "", " ", "null", "1", "1e3", "true",
    "auto", "\u0000", "\ud800", "é", "\u202e", "💥" * 50, "x" * 5000, "../..", "/", ".", "{{ 7 * 7 }}", "{% for %}",
    "{0.__class__}", [], {}, [[]], [None], {"kind": None}, {"": ""}, ["a", 1, None], {"a": {"b": {"c": []}}}, [1, 2],
    "a:b", "os:getcwd", "2020-01-01",
)  # fmt: skip
PLAUSIBLE = (0, 1, 2, 3, 5, 8, 16, 100, 1000, 10**6, 0.0, 1e-9, 0.01, 0.5, 0.99, 1.0, 2.5)
"""Numbers that a key may well take."""
TEXT = (
    "\t",
    ":",
    "{",
    "}",
    "[",
    "- ",
    "&a ",
    "*a",
    "!!python/object:os.system ",
    "|",
    ">",
    "'",
    '"',
    "#",
    "\x00",
    "\ufeff",
    "? ",
)


def paths(tree: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree of dicts and lists."""
    found = [here]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += paths(value, (*here, key))
    return found


def mutated(tree: Any, rng: random.Random) -> Any:
    """The tree with one to three changes: a value of another kind, a key gone, misspelt or new, two values swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = [place for place in paths(tree) if place]
        if not places:
            return rng.choice(JUNK)
        *parents, key = rng.choice(places)
        parent = tree
        for step in parents:
            parent = parent[step]
        act = rng.randrange(7)
        if act <= 2:
            parent[key] = copy.deepcopy(rng.choice(JUNK))
        elif act == 3:
            del parent[key]
        elif act == 4 and isinstance(parent, dict):
            text = str(key)
            parent[text[:1] + text[2:] if len(text) > 1 else text + "x"] = parent.pop(key)
        elif act == 5:
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"value": parent[key]}
        elif isinstance(parent, dict):
            parent[rng.choice(("extra", "", "é", 0, None, "kind", "name"))] = copy.deepcopy(rng.choice(JUNK))
        else:
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(rng.choice(JUNK)))
    return tree


def choices(schema: Any) -> dict[str, list[Any]]:
    """Values that keys of a JSON schema may have, by the name of the key."""
    found: dict[str, list[Any]] = {}
    if isinstance(schema, dict):
        for key, value in schema.get("properties", {}).items():
            allowed = [
                one for part in (value, *value.get("anyOf", ())) for one in part.get("enum", [part.get("const")])
            ]
            found.setdefault(key, []).extend(one for one in allowed if one is not None)
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        for key, allowed in choices(value).items():
            found.setdefault(key, []).extend(allowed)
    return found


def varied(tree: Any, known: dict[str, list[Any]], rng: random.Random) -> Any:
    """The tree with one to four leaves of another value that their key may take: what passes the types."""
    tree = copy.deepcopy(tree)
    leaves = [place for place in paths(tree) if place and place[-1] not in ("path", "source", "output_dir")]
    for place in rng.sample(leaves, min(len(leaves), rng.randrange(1, 5))):
        parent = tree
        for step in place[:-1]:
            parent = parent[step]
        value, allowed = parent[place[-1]], known.get(str(place[-1]))
        if isinstance(value, bool):
            parent[place[-1]] = not value
        elif allowed and not isinstance(value, dict | list):
            parent[place[-1]] = rng.choice(allowed)
        elif value is None or isinstance(value, int | float):
            parent[place[-1]] = rng.choice(PLAUSIBLE)
    return tree


def scrambled(content: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four cut, doubled, changed or put in."""
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(content) + 1)
        length = rng.randrange(1, 20)
        act = rng.randrange(4)
        middle = (b"", content[at : at + length] * 2, bytes([rng.randrange(256)]), rng.choice(TEXT).encode())[act]
        content = content[:at] + middle + content[at + (length if act < 2 else act == 2) :]
    return content
