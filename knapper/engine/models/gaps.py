"""What the native code lacks of models that people ask for, by model_type, so that their refusal says it.

The source is transformers' `modeling_<model_type>.py`, and the published config.json for how weights are stored.
"""

from collections.abc import Mapping
from typing import Final

MISSING: Final[Mapping[str, str]] = {
    "deepseek_v4": "attention over compressed keys",
}
