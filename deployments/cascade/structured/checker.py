"""Compiles the grammar of a request once in a process of its own, before any tier does.

A grammar may take endless time or memory, or end the process that compiles it. So a process that
has loaded xgrammar forks for each one; the kernel ends a fork that takes too much.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import select
import signal
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from cascade.errors import Internal, InvalidRequest
from cascade.structured.grammar import GrammarCompiler, TokenTexts
from cascade.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

    from cascade.engine.tokenizer import Tokenizer

CPU_S = 0.8  # of one grammar
MEMORY_BYTES = 2**29  # likewise
_KNOWN = 256  # grammars that are remembered as valid
_AT_ONCE = 4
_WALK = 32  # tokens of a random answer, whose masks must be quick too
_POLL_S = 0.01
_LOST_S = 60.0  # without a reply, after which the process hangs


class GrammarChecker:
    """Says which grammars can be compiled; its process starts with the first one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: OrderedDict[Grammar, None] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None
        self._replies: dict[int, asyncio.Future[str | None]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._next = 0

    async def check(self, grammar: Grammar) -> None:
        """Check that tiers can compile a grammar.

        Raises:
            InvalidRequest: It is invalid, takes too long or too much memory, or matches no answer.
        """
        if grammar in self._known:
            self._known.move_to_end(grammar)
            return
        async with self._slots:
            reason = await self._ask(grammar)
        if reason is not None:
            raise InvalidRequest(reason)
        self._known[grammar] = None
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    async def start(self) -> None:
        """Start the process, if it does not run."""
        async with self._starting:
            if self._process is not None and self._process.returncode is None:
                return
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cascade.structured.checker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            texts = TokenTexts.of(self._tokenizer, self._tokenizer.vocabulary)
            self._write(texts.as_json())
            self._reading = asyncio.create_task(self._read(self._process))

    async def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._reading is not None:
            await self._reading

    async def _ask(self, grammar: Grammar) -> str | None:
        """Return what is wrong with a grammar."""
        await self.start()
        self._next += 1
        number, reply = self._next, asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        try:
            self._write({"number": number, "kind": grammar.kind, "text": grammar.text})
            async with asyncio.timeout(_LOST_S):
                return await reply
        except TimeoutError as error:
            raise Internal("the process that compiles grammars does not answer") from error
        finally:
            self._replies.pop(number, None)

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process is not None, "started"
        assert self._process.stdin is not None, "a pipe"
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None, "a pipe"
        async for line in process.stdout:
            message = json.loads(line)
            if reply := self._replies.pop(message["number"], None):
                reply.set_result(message["reason"])
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(Internal("the process that compiles grammars has ended"))
        self._replies.clear()


def serve(source: int) -> None:
    """Check grammars, in a fork each, until there are no more.

    Args:
        source: A file from which lines of JSON come: first the tokens, then the grammars.
    """
    forks: dict[int, int] = {}  # the numbers of their messages
    messages = _messages(source, forks)
    tokens = next(message for message in messages if message)
    compiler = GrammarCompiler(TokenTexts.from_json(tokens))
    compiler.compile(Grammar(kind=GrammarKind.REGEX, text="a"))  # the tables of the tokens
    for message in messages:
        if message:
            if fork := os.fork():
                forks[fork] = message["number"]
            else:
                _check(compiler, message)
        while forks:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if not ended:
                break
            number = forks.pop(ended)
            if status:
                took_long = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
                what = f"time than {CPU_S:g} s" if took_long else "memory than there is for it"
                _reply(number, f"it takes more {what} to compile; make it smaller or simpler")


def _messages(source: int, forks: Sized) -> Iterator[dict[str, Any] | None]:
    """Yield the messages of a file as they come, and None now and then while there are forks."""
    rest = b""
    while True:
        *lines, rest = rest.split(b"\n")
        yield from map(json.loads, lines)
        if select.select([source], [], [], _POLL_S if forks else None)[0]:
            data = os.read(source, 2**16)
            if not data:
                return
            rest += data
        else:
            yield None


def _check(compiler: GrammarCompiler, message: dict[str, Any]) -> None:
    """Check a grammar and end this process."""
    used = psutil.Process().memory_info()
    most = getattr(used, "data", used.vms) + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    grammar = Grammar(kind=GrammarKind(message["kind"]), text=message["text"])
    try:
        compiler.check_ends(grammar)
        _walk(compiler, grammar)
        reason = None
    except InvalidRequest as error:
        reason = error.message
        if "bad_alloc" in reason:
            os._exit(1)
    except MemoryError:
        os._exit(1)
    _reply(message["number"], reason)
    os._exit(0)


def _walk(compiler: GrammarCompiler, grammar: Grammar) -> None:
    """Ask for the masks of the beginning of a random answer."""
    mask, rng = compiler.mask(grammar, ()), random.Random(0)  # noqa: S311 - no secret
    answer: list[int] = []
    for _ in range(_WALK):
        bits_1W = np.full((1, -(-compiler.vocabulary // 32)), 2**32 - 1, np.uint32)
        mask.restrict(bits_1W, answer, ())
        flags = np.unpackbits(bits_1W.view(np.uint8), bitorder="little")[: compiler.vocabulary]
        allowed = np.flatnonzero(flags)
        if not len(allowed):
            return
        answer.append(int(rng.choice(allowed)))


def _reply(number: int, reason: str | None) -> None:
    line = json.dumps({"number": number, "reason": reason and reason[:2000]})
    os.write(sys.stdout.fileno(), line.encode() + b"\n")  # at once: others write too


if __name__ == "__main__":
    serve(sys.stdin.fileno())
