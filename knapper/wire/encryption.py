"""Files for age's recipients (age-encryption.org/v1): who has an identity of one of them can read them, and nobody
else.
"""

from typing import Any, Final

import pyrage

from knapper import limits
from knapper.errors import InvalidField

SUFFIX: Final = ".age"  # of an encrypted file's name

_FIELD: Final = "age_encryption_recipients"
_ALLOWED: Final = "native public keys (age1...) and SSH public keys (ssh-ed25519 or ssh-rsa), as age takes them with -r"
_SHOWN: Final = 12  # characters of a wrong one: it may be a secret key


def expect_recipients(recipients: list[str]) -> None:
    """Raises InvalidField for what is none, and for more than age_recipients_max."""
    if len(recipients) > limits.age_recipients_max:
        raise InvalidField(_FIELD, f"{len(recipients)} recipients", f"up to {limits.age_recipients_max}")
    for index, text in enumerate(recipients):
        try:
            _recipient(text)
        except pyrage.RecipientError as error:
            raise InvalidField(f"{_FIELD}[{index}]", f"{text[:_SHOWN]}...", _ALLOWED) from error


def encrypt(content: bytes, recipients: list[str]) -> bytes:
    """The age file. Each call gives another one, and even its length may differ."""
    encrypted: bytes = pyrage.encrypt(content, [_recipient(text) for text in recipients])
    return encrypted


def _recipient(text: str) -> Any:
    kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
    return kind.Recipient.from_str(text)
