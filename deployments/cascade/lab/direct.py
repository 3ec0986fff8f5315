"""Tiers in the router's own process and on its event loop, reached without gRPC and without bytes.

All above the links is the same: what the wire costs is the difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.errors import CascadeError, Unavailable
from cascade.wire import status
from cascade.wire.channel import Link, Peer, Peers
from cascade.wire.frames import Close, Refusal
from cascade.wire.server import Connection

if TYPE_CHECKING:
    from cascade.decoding.session import SessionId
    from cascade.wire.codec import Answer, Question
    from cascade.wire.server import Tier
    from cascade.wire.tiers import Description, Kind


class DirectStream(Connection):
    """Both ends of one session's stream: items are handed over by calls."""

    def __init__(self, tier: Tier, kind: Kind, session_id: SessionId, epoch: int) -> None:
        super().__init__(kind)
        self.link = Link(_Caller(self), session_id, epoch)
        self._tier = tier
        self._open = True

    def ask(self, item: Question) -> None:
        """Hand an item to the tier; an error refuses the session."""
        if not self._open:
            raise self.lost()
        try:
            self._tier.receive(self, item)
        except CascadeError as error:
            self.send(status.refusal(self.link.session_id, self.link.epoch, error))

    def send(self, item: Answer) -> None:
        """Hand an answer to the link."""
        self._open = self._open and not isinstance(item, Refusal)
        self.link.deliver(item, 0)

    def leave(self) -> None:
        """Free the session in the tier."""
        self.link.end()
        if self._open:
            self._open = False
            close = Close(session_id=self.link.session_id, epoch=self.link.epoch)
            self._tier.receive(self, close)

    def lost(self) -> Unavailable:
        """Return the error of a link that was closed or refused."""
        return self.kind.unavailable(f"the link to the {self.kind.name} was closed")


class _Caller:
    """The link's end."""

    frames = 0  # none: items are handed over

    def __init__(self, stream: DirectStream) -> None:
        self._stream = stream

    def send(self, item: Question) -> int:
        self._stream.ask(item)
        return 0

    def leave(self, link: Link) -> None:
        del link
        self._stream.leave()

    def lost(self) -> Unavailable:
        return self._stream.lost()


class DirectPeer(Peer):
    """A tier of this process."""

    def __init__(self, tier: Tier, kind: Kind) -> None:
        super().__init__("here", kind)
        self._tier = tier

    def link(self, session_id: SessionId, epoch: int) -> Link:
        """Return a link for the session."""
        return DirectStream(self._tier, self.kind, session_id, epoch).link

    async def describe(self, *, timeout_s: float = 5.0) -> Description:
        """Return what the tier serves."""
        del timeout_s
        return self._tier.describe()


class DirectPeers(Peers):
    """The one replica of a tier, in this process, whatever the address."""

    def __init__(self, tier: Tier, kind: Kind) -> None:
        super().__init__(kind)
        self._peer = DirectPeer(tier, kind)

    def __getitem__(self, address: str) -> Peer:
        return self._peer
