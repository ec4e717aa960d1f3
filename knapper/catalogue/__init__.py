"""Base models: where their files come from, and which of them are served."""
