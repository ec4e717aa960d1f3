"""Talk to a model, or to a checkpoint of one that is being trained, with OpenAI's own client.

knapper up &
python -m examples.openai_chat "What is knapper?" [MODEL]

MODEL: a base model, tinker://<run>/sampler_weights/<name>, or a run, which stands for the newest of these.
"""

import os
import sys

from openai import OpenAI


def chat(url: str, key: str, model: str, question: str, max_tokens: int = 200) -> str:
    """The answer, which is printed as it is drawn."""
    client = OpenAI(base_url=f"{url}/v1", api_key=key)
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_completion_tokens=max_tokens,
        temperature=0.7,
        seed=0,
        stream=True,
    )
    text = ""
    for chunk in stream:
        said = chunk.choices[0].delta.content or ""
        print(said, end="", flush=True)
        text += said
    print()
    return text


if __name__ == "__main__":
    url = os.environ.get("TINKER_BASE_URL", "http://127.0.0.1:8000")
    key = os.environ.get("TINKER_API_KEY", "tml-local")
    model = sys.argv[2] if len(sys.argv) > 2 else OpenAI(base_url=f"{url}/v1", api_key=key).models.list().data[0].id
    chat(url, key, model, sys.argv[1] if len(sys.argv) > 1 else "Who are you?")
