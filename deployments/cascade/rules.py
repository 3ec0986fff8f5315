"""The deferral rules: closed set, one frozen dataclass each.

Field bounds are `annotated_types` constraints, so that pydantic refuses a bad one at the door.
Source unless said: Narasimhan et al., Faster Cascades via Speculative Decoding, ICLR 2025
(arXiv 2405.19261).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval, Le, Lt, Predicate

Finite: TypeAlias = Annotated[float, Predicate(math.isfinite)]

Unit: TypeAlias = Annotated[float, Interval(ge=0, le=1)]

Signed: TypeAlias = Annotated[float, Interval(ge=-1, le=1)]

_FORBID: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lossless:
    """The target is the expert: pi = p. Ordinary speculative decoding."""

    __pydantic_config__: ClassVar = _FORBID
    kind: Literal["lossless"] = "lossless"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lossy:
    """Lenient speculative decoding: accept with min(1, p / ((1 - alpha) q)).

    `beta` "one" refuses into norm((p - q)+); "solved" into the mentored residual, beta bisected.
    """

    __pydantic_config__: ClassVar = _FORBID
    alpha: Annotated[float, Ge(0), Lt(1)]
    beta: Literal["one", "solved"] = "one"
    kind: Literal["lossy"] = "lossy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """The mixture pi = w p + (1 - w) q."""

    __pydantic_config__: ClassVar = _FORBID
    weight: Unit
    kind: Literal["ensemble"] = "ensemble"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chow:
    """Defer iff max q0 < 1 - alpha (Eq. 2): the drafter alone decides."""

    __pydantic_config__: ClassVar = _FORBID
    alpha: Unit
    kind: Literal["chow"] = "chow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """Defer iff max q0 < max p0 - alpha (Eq. 5)."""

    __pydantic_config__: ClassVar = _FORBID
    alpha: Signed
    kind: Literal["diff"] = "diff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opt:
    """Defer iff max q0 < max p0 - alpha D_TV(p, q) (Eq. 10)."""

    __pydantic_config__: ClassVar = _FORBID
    alpha: Finite
    kind: Literal["opt"] = "opt"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChowLog:
    """Defer iff H(q0) > alpha (App. D, our reading)."""

    __pydantic_config__: ClassVar = _FORBID
    alpha: Finite
    kind: Literal["chow_log"] = "chow_log"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffLog:
    """Defer iff H(q0) > H(p0) + alpha (App. D, our reading)."""

    __pydantic_config__: ClassVar = _FORBID
    alpha: Finite
    kind: Literal["diff_log"] = "diff_log"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptLog:
    """Defer iff H(q0) > H(p0) + alpha D_TV(p, q) (App. D, our reading)."""

    __pydantic_config__: ClassVar = _FORBID
    alpha: Finite
    kind: Literal["opt_log"] = "opt_log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bild:
    """Defer iff -log p0(argmax q0) > alpha (BiLD*, our reading)."""

    __pydantic_config__: ClassVar = _FORBID
    alpha: Annotated[float, Ge(0), Predicate(math.isfinite)]
    kind: Literal["bild"] = "bild"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fuzzy:
    """Defer iff the Jensen-Shannon divergence of p and q exceeds alpha nats (arXiv 2502.20704)."""

    __pydantic_config__: ClassVar = _FORBID
    alpha: Annotated[float, Ge(0), Le(1)]
    kind: Literal["fuzzy"] = "fuzzy"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenV1:
    """A token is not acceptable iff q0(v) < max p0 - alpha (Eq. 13)."""

    __pydantic_config__: ClassVar = _FORBID
    alpha: Signed
    kind: Literal["token_v1"] = "token_v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenV2:
    """A token is not acceptable iff p0(v) < max p0 - alpha (Eq. 14)."""

    __pydantic_config__: ClassVar = _FORBID
    alpha: Signed
    kind: Literal["token_v2"] = "token_v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenV3:
    """A token is not acceptable iff p0(v) < (1 - alpha) max p0 (Eq. 15)."""

    __pydantic_config__: ClassVar = _FORBID
    alpha: Unit
    kind: Literal["token_v3"] = "token_v3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Typical:
    """A token is not acceptable iff p0(v) < min(epsilon, delta exp(-H(p0))) (arXiv 2401.10774)."""

    __pydantic_config__: ClassVar = _FORBID
    epsilon: Annotated[float, Gt(0), Le(1)] = 0.09
    delta: Annotated[float, Gt(0), Le(1)] = 0.3
    kind: Literal["typical"] = "typical"


PositionRule: TypeAlias = Chow | Diff | Opt | ChowLog | DiffLog | OptLog | Bild | Fuzzy

TokenRule: TypeAlias = TokenV1 | TokenV2 | TokenV3 | Typical

Rule: TypeAlias = Lossless | Lossy | Ensemble | PositionRule | TokenRule
