"""Sampling by vLLM: the contract of `knapper.engine.sampling.sampler`, kept by another engine. See docs/vllm.md."""
