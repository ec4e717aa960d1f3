"""The REST routes: list, show and change sessions, runs, checkpoints and weights. A file for each noun."""
