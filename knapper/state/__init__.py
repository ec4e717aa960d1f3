"""The objects in the store: journals of runs, checkpoints, sessions, keys, usage; and their garbage collector."""
