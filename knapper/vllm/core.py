"""The one module that imports vLLM: an engine core in processes of its own, and requests to it.

The core's processes are vLLM's. This side holds an `AsyncLLM`, which binds to the event loop that uses it first.
"""

import itertools
import multiprocessing
import os
from collections.abc import AsyncGenerator, Iterator, MutableMapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from knapper import limits
from knapper.errors import InvalidField, KnapperError, Unavailable

RANKS: Final = (8, 16, 32, 64, 128, 256)  # vLLM's sizes of adapter slots; an adapter's rank may be any up to its slot's
TEMPERATURES: Final = (0.01, 2.0)  # outside of these vLLM raises it silently, or refuses it
SERVER: Final = "_KNAPPER_VLLM_SERVER"  # tells the core's processes which process to end with; not a setting
_CLOSE_S: Final = 1.5  # seconds for a core to end by itself before it is killed: it holds nothing to save
Top = list[tuple[int, float]]  # (token, log-probability), the likeliest first


class CoreEnded(Unavailable):
    """vLLM's engine core ended during a request. Another one starts: retry."""


@dataclass(frozen=True)
class Options:
    """The options of a core. `memory`: its part of a GPU; on a CPU the KV cache has `kv_bytes`, whole GiB. `devices`:
    GPUs that the model is divided over, by tensor parallelism.
    """

    directory: Path
    dtype: Literal["float32", "bfloat16"]
    context: int
    sequences_max: int
    rank_max: int
    adapters_at_once: int
    adapters_kept: int
    device: Literal["cpu", "cuda"]
    memory: float
    kv_bytes: int
    threads: int
    sleeps: bool
    devices: int = 1


@dataclass(frozen=True)
class SequenceRequest:
    """One sequence. `top`: alternatives of each token; `prompt_top`: of each prompt token, None: no prompt scores.

    `whole`: one delta at the end instead of one for each step.
    """

    prompt: list[int]
    seed: int
    tokens_max: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    ends: tuple[int, ...] = ()
    top: int = 0
    prompt_top: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class Adapter:
    """Adapter files for the core. `number` names them to the core, `content` their bytes; neither is reused."""

    number: int
    content: str
    directory: Path


@dataclass(frozen=True)
class TokenDelta:
    """New output of a sequence: tokens since the last delta, each with its log-probability and its alternatives.

    `prompt`, with the first delta: (own log-probability, alternatives) of each prompt token, None at 0.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    tops: Sequence[Top]
    prompt: Sequence[tuple[float, Top] | None] | None = None
    cached: int = 0  # prompt tokens that the prefix cache had


class Core:
    """A running engine core, made by `start`; of no use once `ended`."""

    def __init__(self, llm: Any, sleeps: bool) -> None:
        self._llm = llm
        self._processes = list(llm.engine_core.resources.engine_manager.processes)
        self._sleeps = sleeps
        self._names = itertools.count(1)

    @classmethod
    def start(cls, options: Options, environ: MutableMapping[str, str]) -> "Core":
        """Blocks for tens of seconds, until the core can sample. `environ`: this process's; vLLM reads settings from
        it.

        Raises Unavailable if vLLM does not start.
        """
        _prepare(options, environ)
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise Unavailable(f"vLLM cannot be imported: {error}") from error

        arguments = AsyncEngineArgs(
            model=str(options.directory),
            skip_tokenizer_init=True,  # token ids in, token ids out; stops are found here
            generation_config="vllm",  # ignores the model's own defaults for temperature and the like
            dtype=options.dtype,
            max_model_len=options.context,
            max_num_seqs=options.sequences_max,
            max_logprobs=limits.top_logprobs_max,
            logprobs_mode="processed_logprobs",  # of the sampling distribution: tempered and truncated
            enable_lora=True,
            max_loras=options.adapters_at_once,
            max_cpu_loras=max(options.adapters_kept, options.adapters_at_once),
            max_lora_rank=next(rank for rank in RANKS if rank >= options.rank_max),
            enable_prefix_caching=True,
            enforce_eager=options.device == "cpu",  # compiling takes minutes there, and gains little
            enable_sleep_mode=options.sleeps,
            tensor_parallel_size=options.devices,
            disable_log_stats=True,
            worker_extension_cls="knapper.vllm.worker.WorkerPatches",
            **({"gpu_memory_utilization": options.memory} if options.device == "cuda" else {}),
        )
        try:
            return cls(AsyncLLM.from_engine_args(arguments), options.sleeps)
        except Exception as error:  # any reason; its own lines are in the log
            raise Unavailable(f"vLLM did not start: {error}", retry_after_s=10.0) from error

    async def patch(self) -> None:
        """Patch the worker before the first sample. Raises CoreEnded."""
        with _core_errors():
            await self._llm.collective_rpc("knapper_patch")

    @property
    def ended(self) -> bool:
        """Whether its processes have ended, or are about to."""
        return bool(self._llm.errored)

    @property
    def pids(self) -> list[int]:
        """The processes that this one started for it; those have workers of their own."""
        return [process.pid for process in self._processes]

    async def generate(self, request: SequenceRequest, adapter: Adapter | None) -> AsyncGenerator[TokenDelta]:
        """Closing it ends the sequence in the core too. Raises CoreEnded."""
        from vllm.inputs import tokens_input

        name = str(next(self._names))
        outputs = self._llm.generate(tokens_input(request.prompt), _params(request), name, lora_request=_lora(adapter))
        with _core_errors():
            async with aclosing(outputs):
                async for output in outputs:
                    yield _delta(output, request)

    async def load(self, adapter: Adapter) -> None:
        """Load an adapter between two steps. Raises CoreEnded, or KnapperError if vLLM refuses it."""
        try:
            with _core_errors():
                await self._llm.add_lora(_lora(adapter))
        except KnapperError:
            raise
        except Exception as error:  # its worker's errors come as any type
            raise KnapperError(f"vLLM does not load adapter {adapter.content}: {error}") from error

    async def forget(self, adapter: Adapter) -> None:
        """Unload an adapter. No effect if it is not loaded, or the core has ended."""
        if not self.ended:
            await self._llm.remove_lora(adapter.number)

    async def sleep(self) -> bool:
        """Release the GPU's memory, weights kept in the host's. False where vLLM cannot: close it then."""
        if not self._sleeps:
            return False
        with _core_errors():
            await self._llm.sleep(level=1)
        return True

    async def wake(self) -> None:
        """Undo `sleep`. Raises CoreEnded."""
        with _core_errors():
            await self._llm.wake_up()

    def close(self) -> None:
        """End its processes. Blocks until they have ended, a few seconds at most."""
        try:
            self._llm.shutdown(timeout=_CLOSE_S)
        finally:
            for process in self._processes:
                process.kill()
                process.join()


def abandon_start() -> None:
    """End a `Core.start` that blocks in another thread, once it has a process. Running cores end too."""
    for process in multiprocessing.active_children():
        if process.name.startswith("EngineCore"):
            process.kill()


@contextmanager
def _core_errors() -> Iterator[None]:
    """Raises CoreEnded for vLLM's errors of an ended core."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError) as error:
        raise CoreEnded(f"the vLLM engine ended: {error}", retry_after_s=5.0) from error


def _prepare(options: Options, environ: MutableMapping[str, str]) -> None:
    """Sets the options that vLLM reads from the environment only. An operator's values stay, except for KNAPPER_
    settings.

    Raises InvalidField for a value that would end the core at the first sample.
    """
    if options.device == "cpu" and environ.get("VLLM_BATCH_INVARIANT", "0") != "0":
        raise InvalidField(
            "VLLM_BATCH_INVARIANT", environ["VLLM_BATCH_INVARIANT"], "0 on a CPU",
            "vLLM's batch-invariant kernels are for GPUs: unset it",
        )  # fmt: skip
    variables = {
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the patches of knapper.vllm.worker are for version 1
        "VLLM_NO_USAGE_STATS": "1",  # it would report to its makers
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads: a fork would inherit their locks
        "HF_HUB_OFFLINE": "1",
    }
    if options.device == "cpu":
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": str(options.kv_bytes // (1024 * limits.MIB)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes of a pod or laptop compute too
            "OMP_WAIT_POLICY": "PASSIVE",
            "KMP_BLOCKTIME": "0",
            "TORCH_COMPILE_DISABLE": "1",  # it compiles one small function, for 13 s of the first request
        }
        if options.threads:
            environ["OMP_NUM_THREADS"] = str(options.threads)
    for name, value in variables.items():
        environ.setdefault(name, value)
    environ[SERVER] = str(os.getpid())


def _params(request: SequenceRequest) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=request.tokens_max,
        seed=request.seed,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        ignore_eos=True,  # end tokens are among stop_token_ids
        stop_token_ids=list(request.ends),
        logprobs=request.top,
        prompt_logprobs=request.prompt_top,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY if request.whole else RequestOutputKind.DELTA,
    )


def _lora(adapter: Adapter | None) -> Any:
    from vllm.lora.request import LoRARequest

    # The name is the key of cached prompts: by content, no two adapters ever share one.
    return None if adapter is None else LoRARequest(adapter.content, adapter.number, str(adapter.directory))


def _delta(output: Any, request: SequenceRequest) -> TokenDelta:
    [completion] = output.outputs
    if completion.finish_reason in ("abort", "error"):
        raise CoreEnded(f"vLLM aborted a sequence ({completion.finish_reason})")
    tokens = list(completion.token_ids)
    rows = completion.logprobs or []
    prompt = output.prompt_logprobs or None
    return TokenDelta(
        tokens=tokens,
        logprobs=[row[token].logprob for token, row in zip(tokens, rows, strict=True)],
        tops=[_top(row, request.top) for row in rows],
        prompt=None if prompt is None else [_prompt_row(row, request) for row in prompt],
        cached=output.num_cached_tokens or 0,
    )


def _prompt_row(row: Any, request: SequenceRequest) -> tuple[float, Top] | None:
    if row is None:
        return None
    first = next(iter(row.values()))  # the prompt's own token comes first
    return first.logprob, _top(row, request.prompt_top or 0)


def _top(row: Any, k: int) -> Top:
    """The k likeliest; the row also has the token itself, at any rank."""
    ranked = sorted((entry.rank, token, entry.logprob) for token, entry in row.items() if entry.rank <= k)
    return [(token, logprob) for _, token, logprob in ranked][:k]
