"""A checkpoint leaves, merged into its base model, as GGUF, for Ollama, to a hub; an adapter of others becomes one."""
