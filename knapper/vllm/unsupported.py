"""Which adapters that train_step makes vLLM cannot have. Everything else is the torch sampler's and vLLM's alike."""

from knapper.state.journal.records import Spec


def refusal(spec: Spec, rank_max: int) -> str:
    """Why this one is for the torch sampler only; empty if it is not."""
    if spec.rank > rank_max:
        return (
            f"the adapter has rank {spec.rank}; this vLLM sampler has room for ranks up to {rank_max}. Sample it with "
            "the torch sampler (KNAPPER_SAMPLER=torch), or raise KNAPPER_VLLM_RANK"
        )
    return ""
