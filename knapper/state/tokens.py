"""Access tokens: short-lived signed statements of a client's identity, which it gets for its key and sends instead."""

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
    """Of a token. The SDK reads `sub`, `org_id` and `email` for whoami, `iat` and `exp` for its refreshes."""

    sub: str  # a user's URN
    org_id: str
    email: str  # empty: keys have no person
    tenant: str
    key: str  # the id of its key, empty while keys are off; the token is refused once the key is revoked
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
        """With the store's secret, created if there is none. `new_id`: 128 random bits in hexadecimal.

        A damaged secret does not keep a gateway from starting; only requests that need it get the error.
        """
        try:
            return AccessTokens(clock, await secrets.get_or_create(store, "tokens", new_id))
        except ERRORS as error:
            damage.report(error)
            return AccessTokens(clock, b"", error)

    def issue(self, tenant: Tenant, key: str) -> str:
        """A token that is valid for an hour, and no longer than its key."""
        self._expect_secret()
        now = int(self.clock())
        claims = Claims(
            sub=f"tml:user:{tenant}", org_id=tenant, email="", tenant=tenant, key=key, iat=now,
            exp=now + int(limits.token_s),
        )  # fmt: skip
        return jwt.encode(msgspec.structs.asdict(claims), self._secret, algorithm=_ALGORITHM)

    def claims(self, token: str) -> Claims:
        """The claims of a token. Raises InvalidToken if it has expired or this server did not sign it."""
        self._expect_secret()
        with parsing(_not_ours):
            payload = jwt.decode(
                token,
                self._secret,
                algorithms=[_ALGORITHM],
                options={"verify_exp": False, "verify_iat": False},  # it would read a clock of its own
            )
            claims = msgspec.convert(payload, Claims)
        if self.clock() >= claims.exp:
            raise InvalidToken("the token has expired; exchange your key for another (the SDK does so by itself)")
        return claims

    def _expect_secret(self) -> None:
        if self._missing is not None:
            raise self._missing


def _not_ours(_: Exception) -> InvalidToken:
    return InvalidToken("the token is not one that this server signed; send your key, or exchange it anew")
