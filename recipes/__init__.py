"""Recipes: each a folder with a README, a script, a notebook, and the figures that a run of it produced."""
