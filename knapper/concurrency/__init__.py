"""Fair sharing, retries, and shutdown for threads and tasks."""
