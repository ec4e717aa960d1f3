"""What the gateway sees of samples and passes, for knapper.diagnostics."""
