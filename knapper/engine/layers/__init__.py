"""Layers that every architecture shares: linears, attention, rotary positions, LoRA, the head; each batch-invariant."""
