"""One machine, no cloud: what stands in for Knative under `knapper up`."""
