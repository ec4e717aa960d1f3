"""Text for people: sizes, suggestions for mistyped words, and safe output on terminals."""
