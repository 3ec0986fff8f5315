"""The deferral rules: a closed set, one frozen dataclass each.

The bounds of the fields are `annotated_types` constraints, which pydantic checks in requests and
settings. In the formulas q and p are the drafter's and the expert's distributions after sampling
parameters are applied, q0 and p0 the same without them. If no source is given, the rule is from
Narasimhan et al., Faster Cascades via Speculative Decoding, ICLR 2025 (arXiv 2405.19261).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval, Le, Lt

_FLOAT32_MAX = 3.4028234663852886e38  # rules are evaluated in float32

Finite: TypeAlias = Annotated[float, Interval(ge=-_FLOAT32_MAX, le=_FLOAT32_MAX)]

Unit: TypeAlias = Annotated[float, Interval(ge=0, le=1)]

Signed: TypeAlias = Annotated[float, Interval(ge=-1, le=1)]


class _Strict:
    """Makes pydantic reject unknown fields."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lossless(_Strict):
    """Ordinary speculative decoding: the target distribution is the expert's, pi = p."""

    kind: Literal["lossless"] = "lossless"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lossy(_Strict):
    """Lenient speculative decoding: accept with min(1, p / ((1 - alpha) q)).

    A rejected token is replaced from norm((p - q)+) if `beta` is "one", and from the mentored
    residual if it is "solved", where beta is found by bisection.
    """

    alpha: Annotated[float, Ge(0), Lt(1)]
    beta: Literal["one", "solved"] = "one"
    kind: Literal["lossy"] = "lossy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble(_Strict):
    """The mixture pi = w p + (1 - w) q."""

    weight: Unit
    kind: Literal["ensemble"] = "ensemble"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chow(_Strict):
    """Defer iff max q0 < 1 - alpha (Eq. 2). Reads the drafter alone."""

    alpha: Unit
    kind: Literal["chow"] = "chow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff(_Strict):
    """Defer iff max q0 < max p0 - alpha (Eq. 5)."""

    alpha: Signed
    kind: Literal["diff"] = "diff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opt(_Strict):
    """Defer iff max q0 < max p0 - alpha D_TV(p, q) (Eq. 10)."""

    alpha: Finite
    kind: Literal["opt"] = "opt"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChowLog(_Strict):
    """Defer iff H(q0) > alpha (App. D, our reading)."""

    alpha: Finite
    kind: Literal["chow_log"] = "chow_log"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffLog(_Strict):
    """Defer iff H(q0) > H(p0) + alpha (App. D, our reading)."""

    alpha: Finite
    kind: Literal["diff_log"] = "diff_log"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptLog(_Strict):
    """Defer iff H(q0) > H(p0) + alpha D_TV(p, q) (App. D, our reading)."""

    alpha: Finite
    kind: Literal["opt_log"] = "opt_log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bild(_Strict):
    """Defer iff -log p0(argmax q0) > alpha (BiLD*, our reading)."""

    alpha: Annotated[float, Interval(ge=0, le=_FLOAT32_MAX)]
    kind: Literal["bild"] = "bild"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fuzzy(_Strict):
    """Defer iff the Jensen-Shannon divergence of p and q exceeds alpha nats (arXiv 2502.20704)."""

    alpha: Annotated[float, Ge(0), Le(1)]
    kind: Literal["fuzzy"] = "fuzzy"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenV1(_Strict):
    """A token is not acceptable iff q0(v) < max p0 - alpha (Eq. 13)."""

    alpha: Signed
    kind: Literal["token_v1"] = "token_v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenV2(_Strict):
    """A token is not acceptable iff p0(v) < max p0 - alpha (Eq. 14)."""

    alpha: Signed
    kind: Literal["token_v2"] = "token_v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenV3(_Strict):
    """A token is not acceptable iff p0(v) < (1 - alpha) max p0 (Eq. 15)."""

    alpha: Unit
    kind: Literal["token_v3"] = "token_v3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Typical(_Strict):
    """A token is not acceptable iff p0(v) < min(epsilon, delta exp(-H(p0))) (arXiv 2401.10774)."""

    epsilon: Annotated[float, Gt(0), Le(1)] = 0.09
    delta: Annotated[float, Gt(0), Le(1)] = 0.3
    kind: Literal["typical"] = "typical"


PositionRule: TypeAlias = Chow | Diff | Opt | ChowLog | DiffLog | OptLog | Bild | Fuzzy

TokenRule: TypeAlias = TokenV1 | TokenV2 | TokenV3 | Typical

Rule: TypeAlias = Lossless | Lossy | Ensemble | PositionRule | TokenRule
