"""The OpenAI protocol: models, completions and chat completions, over the same samples as everything else."""
