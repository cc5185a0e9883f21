"""The READMEs tell the truth: their maps name every source file, their tables every setting and every route."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest

from tests.support.tree import PACKAGES, ROOT, name_of, source_files, tree_of

READMES = {
    folder: (ROOT / folder / "README.md").read_text("utf-8") for folder in ("", "tests/bench", *PACKAGES)
}


def section(folder: str, title: str) -> str:
    match = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", READMES[folder], re.MULTILINE | re.DOTALL)
    assert match, f"{folder}/README.md has no section {title}"
    return match[1]


def files_on_the_map(package: str) -> list[str]:
    """Paths of the files in the package's tree, put together from its indentation, two spaces a level."""
    match = re.search(r"```\n(.*?)```", section(package, "The map"), re.DOTALL)
    assert match
    found: list[str] = []
    folders: list[str] = []
    for line in match[1].splitlines():
        if not line.strip() or line.lstrip().startswith("#"):  # the name of a room
            continue
        name, _, meaning = line.strip().partition(" ")
        assert meaning.strip(), f"{name} has no word of explanation"
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        path = PurePosixPath(*folders, name)
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
        else:
            found.append(str(path))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_maps_name_every_source_file(package: str) -> None:
    # An __init__.py that holds nothing but words needs no line.
    expected = {
        name_of(path)
        for path in source_files(package)
        if path.name != "__init__.py" or path.parent.name in ("kernels", "cpu", "gpu")
    }
    found = files_on_the_map(package)
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_the_settings_table_is_complete() -> None:
    from jobs.settings import EngineSettings, Settings

    rows = dict(re.findall(r"^\| `(NIGHTPRESS_\w+)` \| (.*?) \|", section("jobs", "Settings"), re.MULTILINE))
    fields = {f"NIGHTPRESS_{name.upper()}": field for name, field in Settings.model_fields.items()}
    del fields["NIGHTPRESS_ENGINE"]
    fields |= {
        f"NIGHTPRESS_ENGINE__{name.upper()}": field for name, field in EngineSettings.model_fields.items()
    }
    assert set(rows) == set(fields)
    for name, field in fields.items():
        default = field.default
        shown = {None: "none", "": "empty"}.get(default) if default in (None, "") else None
        shown = shown or (f"{default:g}" if isinstance(default, float) else str(default))
        assert rows[name] == shown, f"{name}: README says {rows[name]}, the code {shown}"


def test_the_table_of_routes_is_complete() -> None:
    from api.app import create_app
    from jobs.settings import Settings

    app = create_app(Settings(database_url="sqlite:///:memory:"))
    exist = {
        f"{method.upper()} {re.sub(r'{[a-z_]+}', '{id}', path)}"
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }
    told = set(re.findall(r"`((?:GET|POST|PATCH|DELETE) /[^`]*)`", section("api", "Routes")))
    assert told == exist


def test_files_that_are_named_exist() -> None:
    text = "".join(READMES.values())
    named = set(re.findall(r"`((?:api|jobs|engine|kernels|migrations|tests)/[\w/.]+)`", text))
    assert named
    assert not {name for name in named if not (ROOT / name).exists()}


@pytest.mark.parametrize("folder", [name for name in READMES if name not in ("migrations", "tests/bench")])
def test_links_lead_somewhere(folder: str) -> None:
    """Every link of our own names a README that exists and, behind #, one of its headings."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", READMES[folder])
    assert links
    for path, anchor in links:
        target = (ROOT / folder / path).resolve() if path else ROOT / folder / "README.md"
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), f"{path}#{anchor}"


def anchors(readme: str) -> set[str]:
    """What a link may name behind #, as GitHub makes it of a heading."""
    titles = re.findall(r"^#+ (.*)$", readme, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_commands_exist() -> None:
    from api.cli import main

    match = re.search(r"```\nnightpress (.*)\n```", section("api", "The command line"))
    assert match
    assert set(match[1].split(" | ")) == set(main.commands)
    assert set(re.findall(r"`make ([\w-]+)`", READMES[""])) <= {
        line.split(":")[0]
        for line in (ROOT / "Makefile").read_text().splitlines()
        if re.match(r"[\w-]+:", line)
    }


def test_init_files_hold_what_the_map_leaves_out() -> None:
    """An __init__.py that is not on the map has no code worth finding: at most imports and a lazy door."""
    for path in source_files():
        if path.name == "__init__.py" and path.parent.name not in ("kernels", "cpu", "gpu"):
            assert len(tree_of(path).body) <= 6, name_of(path)
