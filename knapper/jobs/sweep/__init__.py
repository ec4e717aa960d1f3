"""Sweeps: one job.yaml that stands for many jobs, over a grid or by a search, and the best of them."""
