"""Tokenizers as fixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.support.toy_tokenizers import TEMPLATE, byte_level, metaspace, wrap

if TYPE_CHECKING:
    from cascade.engine.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return wrap(byte_level(), chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def space_tokenizer() -> Tokenizer:
    return wrap(metaspace())


@pytest.fixture(scope="session", params=["byte", "space"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(f"{request.param}_tokenizer")
