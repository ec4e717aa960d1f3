"""What docs/compatibility.md says of each public method of the SDK, and the call that shows it.

`python -m tests.conformance.compatibility` writes the page anew.
"""
