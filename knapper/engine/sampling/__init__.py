"""Sampling: sequences of many adapters decode together, with a prefix cache, as if each were alone."""
