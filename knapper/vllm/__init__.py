"""Sampling by vLLM: the contract of knapper.engine.sampler, kept by another engine. docs/vllm.md tells of it."""
