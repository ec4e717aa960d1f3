"""The REST group: what was made, by whom, how large; and what may be done to it. A file for each noun."""
