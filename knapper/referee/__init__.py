"""Scores any server that speaks Tinker's protocol, through the unmodified SDK: what it says, and how far it is off."""
