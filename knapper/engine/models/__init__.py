"""Base models: a directory of weights becomes a model that trains, prefills and decodes."""
