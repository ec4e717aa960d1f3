"""Requests of strangers and of other tenants, and bad input."""
