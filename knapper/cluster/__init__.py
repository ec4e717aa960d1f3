"""What an operator's machine does with a cluster: render the manifests, apply them, look for what is wrong."""
