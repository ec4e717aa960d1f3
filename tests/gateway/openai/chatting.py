"""A tiny model that can be talked to: its directory has a chat template."""

import json
from pathlib import Path

from tests.engine.tiny import context, tiny_model

TEMPLATE = (
    "{% for message in messages %}{{ bos_token }}{{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)


def chat_model(directory: Path, template: str | None = TEMPLATE, context: int = context) -> Path:
    """`directory`, now with a tiny model, and with the template in its tokenizer_config.json."""
    tiny_model(directory, context=context)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if template is not None:
        config["chat_template"] = template
    path.write_text(json.dumps(config), encoding="utf-8")
    return directory
