"""What a function's process holds between two requests: the engine, the runs it has claimed, the adapters it samples from."""
