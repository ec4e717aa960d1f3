"""Sampling by vLLM: the contract of `knapper.engine.sampling.scheduler`, kept by another engine. See docs/vllm.md."""
