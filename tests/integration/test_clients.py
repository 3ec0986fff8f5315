"""Every recipe of docs/clients.md runs as it stands, against the shipped pair over HTTP."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support.programs import CLIENTS, execute, install, install_node_clients

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text()
SERVER = "http://127.0.0.1:8000"  # as the page has it
RUN_S = 240

AGENTS, INSTRUCTOR = "OpenAI Agents SDK: an agent", "instructor: JSON"
OWN = {AGENTS: "agents.txt", INSTRUCTOR: "instructor.txt"}  # have environments of their own
WEATHER = r"city='(Paris|Rome)' degrees=-?\d+"
WEATHER_OBJECT = r"Weather\(city='(Paris|Rome)', degrees=-?\d+\)"
WEATHER_JSON = r'\{"city":"(Paris|Rome)","degrees":-?\d+\}'
CALLED = r"12 degrees in (Paris|Rome)"
ANSWER = r"answer:.*"

PRINTED = {
    "openai for Python: JSON": f"{WEATHER}\n{WEATHER}",
    "openai for Python: tools": f"({CALLED}\n)+{ANSWER}",
    "openai for Python: its tool runner": ANSWER,
    AGENTS: rf"({CALLED}\n)+{ANSWER}\n{WEATHER_OBJECT}",
    "openai for Node: JSON": WEATHER_JSON,
    "openai for Node: its tool runner": CALLED,
    "LangChain: JSON": f"{WEATHER_OBJECT}\n{WEATHER_OBJECT}",
    "LangGraph: an agent": rf"human: [^\n]+\nai: \n(tool: {CALLED}\n)+ai:.*",
    INSTRUCTOR: "\n".join([WEATHER_OBJECT] * 4),
    "pydantic-ai: JSON and tools": f"{WEATHER_OBJECT}\n{WEATHER_OBJECT}",
    "Vercel's AI SDK: JSON and tools": f"{WEATHER_JSON}\n{CALLED}\n{ANSWER}",
}


class Recipe(NamedTuple):
    language: str
    code: str


def recipes() -> dict[str, Recipe]:
    """Return the recipes of the page by their headings."""
    sections = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    found = {name: re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL) for name, text in sections}
    return {name: Recipe(*block) for name, (block,) in found.items()}


RECIPES = recipes()


@pytest.fixture(scope="module")
async def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the clients for Node."""
    return await install_node_clients(tmp_path_factory.mktemp("node"))


async def check(name: str, url: str, program: str, folder: Path) -> None:
    """Run a recipe in a folder, and check what it prints."""
    recipe = RECIPES[name]
    assert SERVER in recipe.code
    file = folder / f"recipe.{'js' if recipe.language == 'js' else 'py'}"
    file.write_text(recipe.code.replace(SERVER, url))
    code, printed, error = await execute(program, file.name, cwd=folder, timeout_s=RUN_S)
    assert code == 0, error
    assert re.fullmatch(PRINTED[name], printed.strip(), re.DOTALL), printed


def test_every_recipe_has_an_expectation() -> None:
    assert RECIPES.keys() == PRINTED.keys()


OTHERS = {name: one for name, one in RECIPES.items() if name not in OWN}


@pytest.mark.parametrize("name", [name for name, one in OTHERS.items() if one.language != "js"])
async def test_a_recipe_in_python_runs(name: str, shipped_url: str, tmp_path: Path) -> None:
    for module in re.findall(r"^(?:from|import) (\w+)", RECIPES[name].code, re.MULTILINE):
        if find_spec(module) is None:
            pytest.skip(f"needs {module}: pip install -e '.[clients]'")
    await check(name, shipped_url, sys.executable, tmp_path)


@pytest.mark.parametrize("name", [name for name, one in OTHERS.items() if one.language == "js"])
async def test_a_recipe_in_javascript_runs(name: str, shipped_url: str, node: Path) -> None:
    await check(name, shipped_url, "node", node)


@pytest.mark.parametrize("name", OWN)
async def test_a_recipe_in_an_environment_of_its_own_runs(
    name: str, shipped_url: str, tmp_path: Path
) -> None:
    python = str(tmp_path / "venv" / "bin" / "python")
    wanted = str(CLIENTS / OWN[name])
    await install(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    await install(python, "-m", "pip", "install", "-q", "-r", wanted, cwd=tmp_path)
    await check(name, shipped_url, python, tmp_path)
