"""What a function's process holds between two requests.

The engine, the runs it has claimed, the adapters it samples from.
"""
