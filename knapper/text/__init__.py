"""Text for people: sizes, suggestions for a mistyped word, and what is fit for a terminal."""
