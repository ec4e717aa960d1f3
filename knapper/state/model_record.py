"""The record of a served base model."""

import hashlib

from knapper.state.journal.records import Record
from knapper.wire.image_tokens import ImageTokens


class ModelRecord(Record, frozen=True, kw_only=True):
    """One base model. Doorbells go to the URLs; without either of them the model is known, but not served."""

    name: str  # what clients call it: a hub name, or the directory's path
    directory: str  # of its files, if clients on this machine may read them; else empty
    tokenizer_id: str  # for AutoTokenizer on any machine; on this one, the directory works without a hub
    context: int  # tokens
    vocab: int
    arch: str
    dtype: str
    trainable: bool
    sampleable: bool
    train_step_url: str
    sample_url: str
    computed_by: str = ""  # native or transformers; empty in older records
    images: ImageTokens | None = None  # None: it reads texts alone


def slug(name: str) -> str:
    """The segment of a model's keys: any name becomes a plain one."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]
