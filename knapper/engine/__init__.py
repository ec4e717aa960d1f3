"""The engine: one frozen base model, many adapters, training and sampling on one device."""
