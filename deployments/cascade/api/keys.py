"""API keys: who may call and how much, from a file with their hashes that may change at any time.

Quotas count in each router by itself: with several, a caller may reach that many times the quota.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError

from cascade.changing_file import file_stamp
from cascade.errors import ContextTooLong, QuotaExceeded, StartupError
from cascade.types import Positive  # noqa: TC001 - pydantic reads it

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

logger = logging.getLogger(__name__)

MINUTE_S = 60.0

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ApiKey(BaseModel):
    """One caller: the hash of its key, and its quotas; an absent one is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name  # in logs and metrics
    sha256: Sha256
    weight: Positive = 1  # of its turns, where callers wait for a tier
    answers: Positive | None = None  # at the same time
    context_tokens: Positive | None = None  # of prompt and completion of an answer
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None  # of prompts and completions


_KEYS = TypeAdapter(list[ApiKey])


def hash_of(key: str) -> str:
    """Return what the file holds of a key."""
    return hashlib.sha256(key.encode(errors="backslashreplace")).hexdigest()


def new_key() -> str:
    """Return a key that nobody has: 256 random bits."""
    return f"sk-{secrets.token_urlsafe(32)}"


class Keys:
    """The keys that a router accepts; callers without one are turned away."""

    def __init__(self, plain: Iterable[str] = (), *, path: str | None = None) -> None:
        """Read the keys.

        Args:
            plain: Keys themselves; their callers are named by the first digits of the hash.
            path: A YAML file with a list of `ApiKey`, read again when it changes.

        Raises:
            StartupError: The file cannot be used, or has no key.
        """
        self._plain = tuple(
            ApiKey(name=f"key-{found[:8]}", sha256=found) for found in map(hash_of, plain)
        )
        self._path = path
        self._stamp = None if path is None else file_stamp(path)
        self._keys = self._plain
        if path is not None:
            try:
                self._keys += read_keys(path)
            except ValueError as error:
                raise StartupError(f"`api_keys_file` cannot be used: {error}") from error

    def find(self, key: str) -> ApiKey | None:
        """Return the caller of a key, compared with all of them in constant time."""
        self._refresh()
        sent, found = hash_of(key), None
        for one in self._keys:
            if hmac.compare_digest(sent, one.sha256):
                found = one
        return found

    def _refresh(self) -> None:
        if self._path is None or (stamp := file_stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = self._plain + read_keys(self._path)
            logger.info("Read %d API keys from %s", len(self._keys), self._path)
        except ValueError as error:
            logger.warning("Keeping the API keys read before: %s", error)


def read_keys(path: str) -> tuple[ApiKey, ...]:
    """Return the keys of a file.

    Raises:
        ValueError: It cannot be read, has no key, has one twice, or is no list of keys.
    """
    try:
        found = _KEYS.validate_python(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML") from error  # its message may quote a key
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(
            f"{path}: {where}: {first['msg']}; wanted a list of keys with `name` and `sha256`, as"
            " `cascade key NAME` prints them"
        ) from error
    if not found:
        raise ValueError(f"{path} has no keys")
    for field in ("name", "sha256"):
        values = [getattr(one, field) for one in found]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ValueError(f"{path}: two keys have the {field} {twice}")
    return tuple(found)


@dataclass(slots=True)
class _Bucket:
    """What is left of a quota per minute; it fills up evenly, and may be overdrawn once."""

    left: float
    filled_s: float

    def fill(self, per_minute: int, *, now_s: float) -> None:
        gained = per_minute * (now_s - self.filled_s) / MINUTE_S
        self.left, self.filled_s = min(self.left + gained, per_minute), now_s

    def wait_s(self, per_minute: int, *, needed: float) -> float:
        """Return how long until so much is left."""
        return max(0.0, (needed - self.left) * MINUTE_S / per_minute)


class Quotas:
    """Counts what each caller takes from this router."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._answers: dict[str, int] = {}

    @contextmanager
    def admit(
        self, key: ApiKey | None, *, answers: int, context_tokens: int
    ) -> Generator[Callable[[int], None]]:
        """Let a call in, until the end of the `with`; yields what counts its tokens.

        Tokens are known when they are there: a call is let in while the quota is not used up, and
        what it takes beyond the quota delays the next.

        Args:
            key: The caller's; None: there are no keys, so no quotas.
            answers: That the call generates side by side.
            context_tokens: The most that one of them may have.

        Raises:
            ContextTooLong: An answer would be longer than the caller's may be.
            QuotaExceeded: The caller has no room now; it says which quota, and when to come back.
        """
        if key is None:
            yield lambda _: None
            return
        self._check(key, answers=answers, context_tokens=context_tokens)
        if key.requests_per_minute is not None:
            self._bucket(key, "requests", key.requests_per_minute).left -= 1
        self._answers[key.name] = self._answers.get(key.name, 0) + answers
        try:
            yield lambda tokens: self._spend(key, tokens)
        finally:
            self._answers[key.name] -= answers
            if not self._answers[key.name]:
                del self._answers[key.name]

    def _check(self, key: ApiKey, *, answers: int, context_tokens: int) -> None:
        if key.context_tokens is not None and context_tokens > key.context_tokens:
            raise ContextTooLong(
                f"Prompt and completion would have up to {context_tokens} tokens; this key may use"
                f" {key.context_tokens}: shorten the prompt or set a smaller max_tokens"
            )
        running = self._answers.get(key.name, 0)
        if key.answers is not None and running + answers > key.answers:
            raise QuotaExceeded(
                f"This key may have {key.answers} answers at the same time; {running} run and this"
                f" call wants {answers}",
                retry_after_s=1.0,
            )
        for what, per_minute in (
            ("requests", key.requests_per_minute),
            ("tokens", key.tokens_per_minute),
        ):
            if per_minute is None:
                continue
            wait_s = self._bucket(key, what, per_minute).wait_s(per_minute, needed=1)
            if wait_s > 0:
                raise QuotaExceeded(
                    f"This key may use {per_minute} {what} a minute, which it has; there is room"
                    f" again in {wait_s:.1f} s",
                    retry_after_s=wait_s,
                )

    def _spend(self, key: ApiKey, tokens: int) -> None:
        if key.tokens_per_minute is not None:
            self._bucket(key, "tokens", key.tokens_per_minute).left -= tokens

    def _bucket(self, key: ApiKey, what: str, per_minute: int) -> _Bucket:
        now_s = self._clock()
        full = _Bucket(left=per_minute, filled_s=now_s)
        bucket = self._buckets.setdefault((key.name, what), full)
        bucket.fill(per_minute, now_s=now_s)
        return bucket


def as_yaml(key: ApiKey) -> str:
    """Return the lines that a file of keys has for a key."""
    fields: dict[str, Any] = key.model_dump(exclude_defaults=True)
    return yaml.safe_dump([fields], sort_keys=False)
