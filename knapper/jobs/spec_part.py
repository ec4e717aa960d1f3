"""What every part of job.yaml is made of."""

from typing import Annotated

import msgspec
from msgspec import Meta

Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class SpecPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all."""
