"""One base model over several devices: PyTorch's FSDP2 keeps its weights in shards, and every rank computes rows.

Rank 0 is the function's process (`Leader`). The others obey it (`follower`), and hold nothing that has to survive.
docs/decisions/0063-ranks-in-one-pod.md
"""
