"""Encryption with age (age-encryption.org/v1): only the identities of the recipients can read the files."""

from typing import Any, Final

import pyrage

from knapper import limits
from knapper.errors import InvalidField

SUFFIX: Final = ".age"  # of an encrypted file's name

_FIELD: Final = "age_encryption_recipients"
_ALLOWED: Final = "native public keys (age1...) and SSH public keys (ssh-ed25519 or ssh-rsa), as age takes them with -r"
_SHOWN: Final = 12  # characters of a wrong value in messages: it may be a secret key


def expect_recipients(recipients: list[str]) -> None:
    """Raises InvalidField for an invalid recipient, and for more than age_recipients_max."""
    if len(recipients) > limits.age_recipients_max:
        raise InvalidField(_FIELD, f"{len(recipients)} recipients", f"up to {limits.age_recipients_max}")
    for index, recipient in enumerate(recipients):
        try:
            _parse(recipient)
        except pyrage.RecipientError as error:
            raise InvalidField(f"{_FIELD}[{index}]", f"{recipient[:_SHOWN]}...", _ALLOWED) from error


def encrypt(content: bytes, recipients: list[str]) -> bytes:
    """The content as an age file. Bytes and length differ from call to call."""
    encrypted: bytes = pyrage.encrypt(content, [_parse(recipient) for recipient in recipients])
    return encrypted


def _parse(recipient: str) -> Any:
    kind = pyrage.ssh if recipient.startswith("ssh-") else pyrage.x25519
    return kind.Recipient.from_str(recipient)
