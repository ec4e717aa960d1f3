"""Jobs: training with no client running. What a folder of files asks for, step by step, out of the store."""
