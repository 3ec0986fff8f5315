"""What a load does, in the log: at each stage, and every few seconds within one."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator

ItemT = TypeVar("ItemT")

log = logging.getLogger(__name__)

_PERIOD_S = 5.0


def counted(
    items: Collection[ItemT], what: str, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[ItemT]:
    """Yield items; log every few seconds how many are done.

    Args:
        items: The items.
        what: What is done to them.
        clock: Seconds, monotonic.
    """
    said_s = clock()
    for done, item in enumerate(items):
        if clock() - said_s >= _PERIOD_S:
            log.info("%s: %d of %d", what, done, len(items))
            said_s = clock()
        yield item


@contextmanager
def reading(name: str) -> Generator[None]:
    """Log how far transformers is with the weights of a model, in place of its own bar."""
    log.info("Reading the weights of %s", name)

    def count(bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        weights = kwargs.get("desc") == "Loading weights" and args
        return counted(args[0], f"Weights of {name} read") if weights else bar(*args, **kwargs)

    set_hook: Any = getattr(transformers_logging, "set_tqdm_hook", _keep_bar)
    before = set_hook(count)
    try:
        yield
    finally:
        set_hook(before)


def _keep_bar(_hook: Any) -> None:
    """Leave releases of transformers without hooks their own bar."""
