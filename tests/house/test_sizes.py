"""One noun per file, small enough to read in one sitting; no drawers for everything."""

from __future__ import annotations

import ast
import re

from tests.support.tree import PACKAGES, name_of, python_files, source_files, tree_of

MAX_LINES = 400
DRAWERS = {"util", "utils", "common", "helper", "helpers", "base", "manager", "misc", "stuff"}
ALL = (*PACKAGES, "tests")


def test_no_file_is_too_long() -> None:
    lengths = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in source_files(*ALL)}
    assert lengths
    too_long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not too_long


def test_no_file_is_a_drawer() -> None:
    words = {name_of(path): set(re.split(r"[/_.]", name_of(path))) for path in source_files(*ALL)}
    assert not {name for name, parts in words.items() if parts & DRAWERS}


def test_every_file_says_what_it_owns() -> None:
    silent = [
        name_of(path)
        for path in python_files(*ALL)
        if tree_of(path).body and ast.get_docstring(tree_of(path)) is None
    ]
    assert not silent
