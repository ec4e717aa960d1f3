"""Everything that lies in the object store: journals of runs, checkpoints, sessions, keys, usage, and one collector."""
