"""The unmodified tinker-cookbook against a real server: what docs/cookbook.md is written from."""
