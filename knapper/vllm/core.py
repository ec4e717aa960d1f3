"""The one module that imports vLLM: an engine core in processes of its own, and what is asked of it.

The core's processes are vLLM's. This side holds an `AsyncLLM`, which is bound to the event loop that uses it first.
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

RANKS: Final = (8, 16, 32, 64, 128, 256)  # that vLLM makes room for; an adapter's may be any up to it
TEMPERATURES: Final = (0.01, 2.0)  # outside of these vLLM raises it in silence, or refuses it
SERVER: Final = "_KNAPPER_VLLM_SERVER"  # names this process to the core's, which end with it; it is no setting
_CLOSE_S: Final = 1.5  # for a core to end by itself, then it is killed: it holds nothing that must be saved
Top = list[tuple[int, float]]  # (token, log-probability), the likeliest first


class CoreEnded(Unavailable):
    """vLLM's engine core ended under a request. Another is on its way: ask again."""


@dataclass(frozen=True)
class Options:
    """How a core is made. `memory`: the part of a GPU that it takes; on a CPU keys and values have `kv_bytes`, which
    are whole GiB."""

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


@dataclass(frozen=True)
class SequenceRequest:
    """One sequence. `top`: alternatives told with each token; `prompt_top`: with each of the prompt's, None: nothing.

    `whole`: it is told once it has ended, and not token by token.
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
    """Files that the core can read. `number` names it to the core, `content` its bytes: both are never used twice."""

    number: int
    content: str
    directory: Path


@dataclass(frozen=True)
class TokenDelta:
    """What came of a sequence: tokens since the last piece, each with its log-probability and its alternatives.

    `prompt`: with the first piece, for each token of the prompt (own log-probability, alternatives), None at 0.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    tops: Sequence[Top]
    prompt: Sequence[tuple[float, Top] | None] | None = None
    cached: int = 0  # tokens of the prompt that other sequences had left


class Core:
    """A running engine. Make it with `start`; it is of no more use once `ended`."""

    def __init__(self, llm: Any, sleeps: bool) -> None:
        self._llm = llm
        self._processes = list(llm.engine_core.resources.engine_manager.processes)
        self._sleeps = sleeps
        self._names = itertools.count(1)

    @classmethod
    def start(cls, options: Options, environ: MutableMapping[str, str]) -> "Core":
        """Blocks for tens of seconds, until it can sample. `environ`: this process's, which vLLM reads settings from.

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
            generation_config="vllm",  # a model's own defaults for temperature and the like are no part of the contract
            dtype=options.dtype,
            max_model_len=options.context,
            max_num_seqs=options.sequences_max,
            max_logprobs=limits.top_logprobs_max,
            logprobs_mode="processed_logprobs",  # of the distribution that is drawn from: tempered and cut
            enable_lora=True,
            max_loras=options.adapters_at_once,
            max_cpu_loras=max(options.adapters_kept, options.adapters_at_once),
            max_lora_rank=next(rank for rank in RANKS if rank >= options.rank_max),
            enable_prefix_caching=True,
            enforce_eager=options.device == "cpu",  # compiling takes minutes there, and gains little
            gpu_memory_utilization=options.memory,
            enable_sleep_mode=options.sleeps,
            disable_log_stats=True,
            worker_extension_cls="knapper.vllm.worker.WorkerPatches",
        )
        try:
            return cls(AsyncLLM.from_engine_args(arguments), options.sleeps)
        except Exception as error:  # whatever keeps it from starting; its own lines are in the log
            raise Unavailable(f"vLLM did not start: {error}", retry_after_s=10.0) from error

    async def patch(self) -> None:
        """Before the first sample. Raises CoreEnded."""
        with _core_errors():
            await self._llm.collective_rpc("knapper_patch")

    @property
    def ended(self) -> bool:
        """Whether its processes are gone, or about to be."""
        return bool(self._llm.errored)

    @property
    def pids(self) -> list[int]:
        """Of the processes that this one started for it; those have workers of their own."""
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
        """Into the core's memory, between two of its steps. Raises CoreEnded, or KnapperError if vLLM refuses it."""
        try:
            with _core_errors():
                await self._llm.add_lora(_lora(adapter))
        except KnapperError:
            raise
        except Exception as error:  # what its worker raises comes as whatever it was
            raise KnapperError(f"vLLM does not load adapter {adapter.content}: {error}") from error

    async def forget(self, adapter: Adapter) -> None:
        """Nothing happens if it is not loaded, or the core has ended."""
        if not self.ended:
            await self._llm.remove_lora(adapter.number)

    async def sleep(self) -> bool:
        """Give the GPU's memory back, weights kept in the host's. False where vLLM cannot: close it then."""
        if not self._sleeps:
            return False
        with _core_errors():
            await self._llm.sleep(level=1)
        return True

    async def wake(self) -> None:
        """After `sleep`. Raises CoreEnded."""
        with _core_errors():
            await self._llm.wake_up()

    def close(self) -> None:
        """End its processes. Blocks until they are gone, a few seconds at most."""
        try:
            self._llm.shutdown(timeout=_CLOSE_S)
        finally:
            for process in self._processes:
                process.kill()
                process.join()


def abandon_start() -> None:
    """Make a `Core.start` that blocks in another thread raise soon, if it has a process yet. Running cores end too."""
    for process in multiprocessing.active_children():
        if process.name.startswith("EngineCore"):
            process.kill()


@contextmanager
def _core_errors() -> Iterator[None]:
    """What vLLM raises when its core is gone, in this library's words."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError) as error:
        raise CoreEnded(f"the vLLM engine ended: {error}", retry_after_s=5.0) from error


def _prepare(options: Options, environ: MutableMapping[str, str]) -> None:
    """What vLLM takes from the environment only. What an operator set stays, but for what KNAPPER_ variables say.

    Raises InvalidField for what would end the core at the first sample.
    """
    if options.device == "cpu" and environ.get("VLLM_BATCH_INVARIANT", "0") != "0":
        raise InvalidField(
            "VLLM_BATCH_INVARIANT", environ["VLLM_BATCH_INVARIANT"], "0 on a CPU",
            "vLLM's batch-invariant kernels are for GPUs: unset it",
        )  # fmt: skip
    variables = {
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the mends of knapper.vllm.worker are for the first
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
            "TORCH_COMPILE_DISABLE": "1",  # one small function of the sampler is, for 13 s of the first request
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
        ignore_eos=True,  # those that count are among the stops
        stop_token_ids=list(request.ends),
        logprobs=request.top,
        prompt_logprobs=request.prompt_top,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY if request.whole else RequestOutputKind.DELTA,
    )


def _lora(adapter: Adapter | None) -> Any:
    from vllm.lora.request import LoRARequest

    # The name keys cached prompts: it is the content, so that no two adapters ever share one.
    return None if adapter is None else LoRARequest(adapter.content, adapter.number, str(adapter.directory))


def _delta(output: Any, request: SequenceRequest) -> TokenDelta:
    [completion] = output.outputs
    if completion.finish_reason in ("abort", "error"):
        raise CoreEnded(f"vLLM broke a text off ({completion.finish_reason})")
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
    own = next(iter(row.values()))  # the prompt's own token comes first
    return own.logprob, _top(row, request.prompt_top or 0)


def _top(row: Any, k: int) -> Top:
    """The k likeliest: the token itself is in the row too, at whatever rank."""
    ranked = sorted((entry.rank, token, entry.logprob) for token, entry in row.items() if entry.rank <= k)
    return [(token, logprob) for _, token, logprob in ranked][:k]
