"""What the documentation has to be typed: commands in blocks and sentences, code, JSON and YAML."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli as serve_cli
from tests.test_docs import PACKAGE, PAGES, ROOT
from typer.main import get_command

from cascade.api.schema import ChatBody
from cascade.cli import app as command_line
from cascade.evaluation import workloads
from cascade.evaluation.grid import GridBlock
from cascade.observability.metric_specs import ENGINE, ROUTER
from cascade.settings import Application
from cascade.types import Statistics

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TASKS = PROJECT["tool"]["poe"]["tasks"]
MARKERS = {text.partition(":")[0] for text in PROJECT["tool"]["pytest"]["markers"]}
RUNS_PYTHON = {"clients.md": "tests/integration/test_clients.py"}  # else tests/serve/test_readme.py
CLICK = {"cascade": get_command(command_line), "serve": serve_cli, "ray": ray_cli}
SHELLS = ("console", "bash", "sh", "shell")
EXTERNAL = {
    "aiperf",
    "chmod",
    "kubectl",
    "nft",
    "mkdir",
    "scp",
    "uv",
}  # not ours, and not installed here
METRICS = {metric.name for metric in (*ROUTER, *ENGINE)}
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, *languages: str) -> list[str]:
    """Return what stands in the blocks of some languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def typed(block: str) -> str:
    """Return what is typed in a console, without what is printed: all, if nothing has a prompt."""
    prompted = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    return "\n".join(prompted) if prompted else block


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell's text, without variables and redirections."""
    text, line = text.replace("\\\n", " "), ""
    for part in text.splitlines():
        line = f"{line}\n{part}".strip()
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;>")
        lexer.whitespace_split = True
        try:
            tokens = list(lexer)
        except ValueError:  # a quotation that goes on
            continue
        line, words = "", list[str]()
        for token in (*tokens, "&&"):
            if set(token) <= set("&|;"):
                yield from filter(None, [words])
                words = []
            elif token.startswith(">") or (words and words[-1] == ">"):
                words = [*words[:-1]] if words and words[-1] == ">" else [*words, ">"]
            elif words or not re.match(r"(export|\w+=.*)$", token):
                words.append(token)
    assert not line, line


LINES = sorted(
    {
        line
        for page in PAGES
        if page.name not in {"CHANGELOG.md", "models.md"}  # what was, and others' error messages
        for line in re.findall(
            r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        )
        if re.match(r"(cascade|poe|pytest|python -m|serve|ray|pip) \S", line)
    }
)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_a_block_of_commands_is_valid_shell(page: Path) -> None:
    for block in blocks(page, *SHELLS):
        check = subprocess.run(
            ["bash", "-n"],  # noqa: S607 - bash is on the path of whoever types this
            input=typed(block), text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_commands_of_blocks_are_accepted(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their options and choices are known, and the files that they name are there."""
    monkeypatch.setenv("CASCADE_LEASE_TOKEN", "secret")
    monkeypatch.chdir(ROOT)
    for block in blocks(page, *SHELLS):
        for program, *words in commands(typed(block)):
            if program in EXTERNAL:
                continue
            if program == "curl":
                assert page == ROOT / "README.md", "nothing runs the curl of another page"
                ChatBody.model_validate_json(words[words.index("-d") + 1])
                continue
            check(program, words)
            for word in words:
                if re.match(r"(cluster|docs|tests|deployments|protos)/", word):
                    assert (ROOT / word).exists(), word
            if program == "cascade":
                command, arguments = resolved(program, words)
                command.make_context(command.name, arguments)


@pytest.mark.parametrize("line", LINES)
def test_a_command_in_a_sentence_has_options_that_exist(line: str) -> None:
    (words,) = commands(line)
    check(words[0], words[1:])


def check(program: str, words: list[str]) -> None:
    """Fail if a command does not exist, or has no such options."""
    match program:
        case "cascade" | "serve" | "ray":
            command, arguments = resolved(program, words)
            known = {"--help", *(name for one in command.params for name in one.opts)}
            known |= {name for one in command.params for name in one.secondary_opts}
            for word in arguments:
                name = re.match(r"--?[a-z][\w-]*", word)
                assert name is None or name[0] in known, (word, sorted(known))
        case "poe":
            assert words[0] in TASKS
        case "pytest":
            marks = re.findall(r"-m (\w+)", " ".join(words))
            assert set(marks) <= MARKERS
            assert all((ROOT / word.partition("::")[0]).exists() for word in words if "/" in word)
        case "python":
            assert words[0] == "-m"
            module = find_spec(words[1])
            assert module is not None
            assert module.origin is not None
            source = Path(module.origin).read_text()
            for option in (word for word in words[2:] if word.startswith("--")):
                assert option[2:].replace("-", "_") in source, option
        case "pip":
            check_install(words)
        case "nginx":
            files = [ROOT / word.removeprefix("$PWD/") for word in words if word.endswith(".conf")]
            assert files
            assert all(file.exists() for file in files)
        case _:
            pytest.fail(f"nothing checks {program}")


def resolved(program: str, words: list[str]) -> tuple[Any, list[str]]:
    """Return the innermost command that words name, and its arguments."""
    command, rest = CLICK[program], list(words)
    while (inner := getattr(command, "commands", None)) and rest and not rest[0].startswith("-"):
        assert rest[0] in inner, (rest[0], sorted(inner))
        command = inner[rest.pop(0)]
    return command, rest


def check_install(words: list[str]) -> None:
    """Fail if there is no such extra or file, or a package that nothing was tested with."""
    assert words.pop(0) == "install"
    pinned = (ROOT / "cluster" / "constraints.txt").read_text().lower()
    while words:
        match re.fullmatch(r"(.*?)(\[.*\])?", words.pop(0)):
            case None:
                pytest.fail("no requirement")
            case found if found[1] == "-c":
                assert (ROOT / words.pop(0)).exists()
            case found if found[1] in {".", "speculative-cascades"}:
                extras = (found[2] or "").strip("[]").split(",")
                assert set(filter(None, extras)) <= set(PROJECT["project"]["optional-dependencies"])
            case found:
                assert found[1] == "-e" or f"\n{found[1]}==" in pinned, found[1]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_code_of_a_page_compiles_and_runs_in_a_test(page: Path) -> None:
    runs = (ROOT / RUNS_PYTHON.get(page.name, "tests/serve/test_readme.py")).read_text()
    folder = page.parent.relative_to(ROOT)
    for block in blocks(page, "python"):
        assert page.name in runs or (str(folder) == "docs" and '"docs").glob("*.md")' in runs)
        assert ast.parse(block).body
    assert not blocks(page, "js") or page.name in RUNS_PYTHON


def test_the_json_of_the_pages_is_a_workload(tmp_path: Path) -> None:
    found = [(page, text) for page in PAGES for text in blocks(page, "json", "jsonl")]
    assert len(found) > 1
    for page, text in found:
        assert page.name == "evaluate.md", "nothing checks the JSON of another page"
        path = tmp_path / "mine.jsonl"
        path.write_text(text)
        assert len(workloads.load(str(path)).items) == len(text.splitlines())


def test_the_yaml_of_a_page_is_accepted() -> None:
    found = [yaml.safe_load(text) for page in PAGES for text in blocks(page, "yaml", "yml")]
    assert len(found) > 1
    for document in found:
        if "curves" in document:
            assert GridBlock.model_validate(document).settings()
        else:
            deployments = document.pop("deployments", [])
            application = {"import_path": "cascade.app:build", "deployments": deployments}
            ServeDeploySchema.model_validate({"applications": [application]})
            settings = Application.model_validate(document)
            for one in deployments:
                settings.changed(one.get("user_config", {}))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_metrics_variables_and_statistics_that_a_page_names_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # names what was
    for text in re.findall(r"`([^`\n]+)`", page.read_text()):
        for name in re.findall(r"\bcascade_[a-z_]+", text):
            assert re.sub(r"_(bucket|sum|count)$", "", name) in METRICS, name
        for name in re.findall(r"\b(?:CASCADE|RAY|OMP|CHAOS)_[A-Z_]+\b", text):
            assert name in sources(), name
        for name in re.findall(r"^usage\.cascade\.(\w+)$", text):
            assert name in Statistics.__dataclass_fields__, name


@cache
def sources() -> str:
    """Return what may name an environment variable."""
    folders = (PACKAGE, ROOT / "cluster", ROOT / "tests" / "chaos")
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return "".join(
        path.read_text(errors="ignore") for path in files if path.suffix != ".safetensors"
    )


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_is_of_a_language_that_is_checked(page: Path) -> None:
    known = {"console", "python", "js", "json", "yaml", "text", ""}
    assert set(re.findall(r"^```(\w+)$", page.read_text(), re.MULTILINE)) <= known
