"""Training: forward_backward requests of many runs in batches of one base model, losses, AdamW."""
