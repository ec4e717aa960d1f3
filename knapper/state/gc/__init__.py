"""Collect: whatever lies in the store and is needed no more is deleted here, and nowhere else."""
