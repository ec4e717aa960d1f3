"""State that a function's process keeps between requests: the engine, claimed runs, and adapters."""
