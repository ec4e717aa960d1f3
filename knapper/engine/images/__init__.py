"""Images in prompts: read from untrusted bytes, placed in their sequences, and computed by a frozen vision tower."""
