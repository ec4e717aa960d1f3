"""What the store says of one base model that is served."""

import hashlib

from knapper.state.journal.records import Record


class ModelRecord(Record, frozen=True, kw_only=True):
    """One base model. The URLs are where bells go; without either of them the model is known, but not served."""

    name: str  # what clients call it: a hub name, or the directory's path
    directory: str  # where its files lie, if clients on this machine may read them; else empty
    tokenizer_id: str  # what AutoTokenizer takes on any machine; on this one, the directory does without a hub
    context: int  # tokens
    vocab: int
    arch: str
    dtype: str
    trainable: bool
    sampleable: bool
    train_step_url: str
    sample_url: str
    computed_by: str = ""  # native, or transformers; of records from before that: not known


def slug(name: str) -> str:
    """Where the versions of a model lie: any name becomes one plain segment."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]
