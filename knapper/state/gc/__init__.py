"""Garbage collection: the only place that deletes objects that are no longer needed."""
