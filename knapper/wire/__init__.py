"""The Tinker protocol: bytes to typed values and back. Imports neither torch nor the SDK."""
