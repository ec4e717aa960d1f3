"""Tokens: short-lived signed statements of who a client is, exchanged for its key and sent in its place."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jwt
import msgspec

from knapper import limits
from knapper.errors import InvalidToken, KnapperError
from knapper.ids import Tenant
from knapper.state import damage, secrets
from knapper.state.damage import ERRORS
from knapper.store import Store
from knapper.wire.untrusted import parsing

_ALGORITHM = "HS256"


class Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a token says. The SDK reads `sub`, `org_id` and `email` for whoami, `iat` and `exp` for its refreshes."""

    sub: str  # a user's URN
    org_id: str
    email: str  # empty: there is no person behind the key
    tenant: str
    key: str  # the id of the key that it was exchanged for, empty where keys are off; it dies with it
    iat: int  # seconds since the epoch
    exp: int


@dataclass(frozen=True)
class AccessTokens:
    """Every gateway over the store signs with the same secret. `clock`: seconds since the epoch."""

    clock: Callable[[], float]
    _secret: bytes = field(repr=False)
    _missing: KnapperError | None = None  # why there is none

    @staticmethod
    async def open(store: Store, clock: Callable[[], float], new_id: Callable[[], str]) -> "AccessTokens":
        """With the store's secret, made now if there is none. `new_id`: 128 random bits in hexadecimal.

        A damaged one keeps nobody from starting: whoever comes with a token, or for one, hears of it.
        """
        try:
            return AccessTokens(clock, await secrets.opened(store, "tokens", new_id))
        except ERRORS as error:
            damage.tell(error)
            return AccessTokens(clock, b"", error)

    def issue(self, tenant: Tenant, key: str) -> str:
        """A token that is good for an hour, and no longer than the key of this id."""
        self._expect_secret()
        now = int(self.clock())
        claims = Claims(
            sub=f"tml:user:{tenant}", org_id=tenant, email="", tenant=tenant, key=key, iat=now,
            exp=now + int(limits.token_s),
        )  # fmt: skip
        return jwt.encode(msgspec.structs.asdict(claims), self._secret, algorithm=_ALGORITHM)

    def claims(self, token: str) -> Claims:
        """What it says. Raises InvalidToken for one that has expired, or that was signed elsewhere."""
        self._expect_secret()
        with parsing(_not_ours):
            found = jwt.decode(
                token,
                self._secret,
                algorithms=[_ALGORITHM],
                options={"verify_exp": False, "verify_iat": False},  # it would look at a clock of its own
            )
            claims = msgspec.convert(found, Claims)
        if self.clock() >= claims.exp:
            raise InvalidToken("the token has expired; exchange your key for another (the SDK does so by itself)")
        return claims

    def _expect_secret(self) -> None:
        if self._missing is not None:
            raise self._missing


def _not_ours(_: Exception) -> InvalidToken:
    return InvalidToken("the token is not one that this server signed; send your key, or exchange it anew")
