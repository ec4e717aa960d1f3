"""A checkpoint leaves: merged into its base model, as GGUF, for Ollama, to a hub. Runs on the client's machine."""
