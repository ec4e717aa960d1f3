"""knapper: fine-tuning that costs nothing while it sleeps. Importing it loads nothing heavy."""

__version__ = "0.1.0"
