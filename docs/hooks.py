"""What `poe docs` adds to the pages of this folder: the files around them, settings and routes."""

from __future__ import annotations

import json
import re
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File, Files, InclusionLevel
from pydantic import TypeAdapter

from cascade.api.http import create_app
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).parents[1]
READMES = (
    *("README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md"),
    *("cluster/README.md", "protos/README.md"),
)
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages by their path in the repository, what they link to, and what is generated."""
    pages = [*(ROOT / name for name in READMES), *sorted((ROOT / "docs").glob("*.md"))]
    linked = {
        (page.parent / link).resolve() for page in pages for link in _LINK.findall(page.read_text())
    }
    for path in (*pages, *sorted(linked - set(pages))):
        name = path.relative_to(ROOT).as_posix()
        file = File(name, str(ROOT), config.site_dir, config.use_directory_urls)
        file.inclusion = InclusionLevel.INCLUDED  # also what begins with a dot
        files.append(file)
    files.append(File.generated(config, "docs/settings.md", content=settings_page()))
    routes = json.dumps(create_app().openapi(), indent=1)
    files.append(File.generated(config, "openapi.json", content=routes))
    return files


def settings_page() -> str:
    """Return every key of `args:`: type and default of the models, meaning of the reference."""
    adapter: TypeAdapter[Any] = TypeAdapter(Application)
    schema = adapter.json_schema()
    unwritten = adapter.dump_python(Application(), mode="json")
    meanings = Meanings((ROOT / "docs" / "reference.md").read_text())
    rows: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for path, kind, default in keys(schema, schema["$defs"], ""):
        heading = path.partition(".")[0] if "." in path else "args"
        heading = {"expert": "drafter, expert", "drafter": "drafter, expert"}.get(heading, heading)
        *branches, name = path.split(".")
        branch = reduce(lambda part, key: part.get(key) or {}, branches, unwritten)
        cells = (kind, plain(branch.get(name, default)), meanings.of(path))
        rows.setdefault(heading, {}).setdefault((path.partition(".")[2], *cells), []).append(path)
    parts = [
        "# Every setting",
        "Each key of `args:` with its type and default, in the [reference](reference.md)'s words.",
    ]
    for heading, found in rows.items():
        lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for (_, kind, default, meaning), paths in found.items():
            names = "<br>".join(f"`{path}`" for path in paths)
            lines.append(f"| {names} | {kind} | {default} | {meaning} |")
        parts += [f"## {heading}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def keys(schema: Any, definitions: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield the path of each leaf of a JSON schema, its type in words and its default."""
    for name, part in schema["properties"].items():
        branches = [
            found
            for one in part.get("anyOf", [part])
            if "properties" in (found := definitions.get(one.get("$ref", "")[8:], {}))
            and "kind" not in found["properties"]
        ]
        if branches:
            yield from keys(branches[0], definitions, f"{path}{name}.")
        else:
            yield f"{path}{name}", described(part, definitions), part.get("default")


def described(schema: Any, definitions: Any) -> str:  # noqa: PLR0911 - one for each kind
    """Return the type of a JSON schema with its bounds or choices."""
    match schema:
        case {"$ref": name}:
            return described(definitions[name[8:]], definitions)
        case {"properties": {"kind": _}}:
            return "[rule](reference.md#the-cascade-object-of-a-request)"
        case {"anyOf": several} | {"oneOf": several}:
            return " or ".join(dict.fromkeys(described(one, definitions) for one in several))
        case {"enum": choices}:
            return ", ".join(f"`{one}`" for one in choices)
        case {"const": only}:
            return f"`{only}`"
        case {"type": "array", "items": items} if items:
            return f"list of {described(items, definitions)}"
        case _:
            return in_bounds(schema)


def in_bounds(schema: Any) -> str:
    """Return a plain type with its bounds."""
    bounds = (
        ("minimum", ">="),
        ("exclusiveMinimum", ">"),
        ("maximum", "<="),
        ("exclusiveMaximum", "<"),
    )
    limits = [f"{sign} {schema[name]:g}" for name, sign in bounds if name in schema]
    words = {"object": "mapping", "null": "none", None: "any"}
    kind = words.get(schema.get("type"), schema.get("type"))
    return " ".join(filter(None, (kind, ", ".join(limits))))


def plain(value: Any) -> str:
    """Return a default as a YAML would say it."""
    return "" if value in (None, [], {}) else f"`{json.dumps(value)}`"


class Meanings:
    """The words of the reference's tables, by section and key."""

    SECTIONS = (  # where the keys below a path stand
        ("drafter.deployment.", "`drafter.deployment`, `expert.deployment`, `router.deployment`"),
        ("expert.deployment.", "`drafter.deployment`, `expert.deployment`, `router.deployment`"),
        ("router.deployment.", "`drafter.deployment`, `expert.deployment`, `router.deployment`"),
        ("drafter.scaling.", "`scaling`"),
        ("expert.scaling.", "`scaling`"),
        ("drafter.", "`drafter`, `expert`"),
        ("expert.", "`drafter`, `expert`"),
        ("router.", "`router`"),
        ("defaults.", "The `cascade` object of a request"),
        ("defaults.", "`defaults`"),
        ("limits.", "`limits`"),
        ("cors.", "`cors`"),
        ("", "Settings"),
    )

    def __init__(self, reference: str) -> None:
        sections = re.split(r"^##+ (.+)\n", reference, flags=re.MULTILINE)
        self._by_section = {
            heading: {
                name: meaning.replace("](#", "](reference.md#")
                for cell, _, meaning in re.findall(
                    r"^\| (`[^|]+) \|([^|]*)\| (.*) \|$", text, re.MULTILINE
                )
                for name in re.findall(r"`([\w.]+)`", cell)
            }
            for heading, text in zip(sections[1::2], sections[2::2], strict=True)
        }

    def of(self, path: str) -> str:
        """Return what a key means, or what the branch means that it is in; nothing if unsaid."""
        for prefix, heading in self.SECTIONS:
            name = path.removeprefix(prefix)
            if path.startswith(prefix) and name in self._by_section[heading]:
                return self._by_section[heading][name]
        return self.of("tls") if path.startswith("tls.") else ""
