"""Proof on a running deployment that kills change nothing: one training twice, the second time under SIGKILL."""
