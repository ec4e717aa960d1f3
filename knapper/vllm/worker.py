"""Two patches to vLLM 0.32 that correct wrong results, and a watchdog that ends its processes with the server.

Runs inside vLLM's worker process. vLLM imports this and calls `knapper_patch`, both by name. Nothing here imports vLLM:
everything is reached from the worker.

- vLLM scores a prompt with the adapters of the rows that are sampled, whichever these are: an adapter on the head then
  gives another's scores, or ends the process. Here each prompt is scored with its own adapter.
- On a CPU a row without an adapter gets the one in the last slot. Here it gets none.
- vLLM's processes outlive a killed server, and keep the GPU's memory. Here they end with it.
"""

import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knapper.vllm.core import SERVER


class WorkerPatches:
    """A base class of vLLM's worker (its option worker_extension_cls)."""

    model_runner: Any

    def knapper_patch(self) -> None:
        """Once, before the first sample."""
        runner = self.model_runner
        _score_prompts_with_their_own_adapters(runner)
        wrappers = runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
        for wrapper in {id(wrapper): wrapper for wrapper in wrappers}.values():
            if type(wrapper).__name__ == "PunicaWrapperCPU":
                _leave_base_rows_alone(wrapper)


def _score_prompts_with_their_own_adapters(runner: Any) -> None:
    model, compute_logits, scores = runner.model, runner.model.compute_logits, runner._get_prompt_logprobs_dict
    rows_max = runner.max_num_reqs  # the length of vLLM's tables of sampled rows
    scored: list[Any] = []  # the request whose prompt is being scored

    def logits_of(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if not scored:
            return compute_logits(hidden, *args, **kwargs)
        lora = scored[0].lora_request
        number = lora.lora_int_id if lora else 0
        parts = []
        for part in hidden.split(rows_max):
            rows = (number,) * part.shape[0]
            runner._set_active_loras(rows, rows, {lora} if lora else set())
            parts.append(compute_logits(part, *args, **kwargs))
        return torch.cat(parts)

    def one_by_one(hidden: Any, scheduled: dict[str, int]) -> dict[str, Any]:
        requested = runner.num_prompt_logprobs
        scores_by_name: dict[str, Any] = {}
        for name in list(requested):
            runner.num_prompt_logprobs = {name: requested[name]}
            scored.append(runner.requests[name])
            try:
                scores_by_name |= scores(hidden, scheduled)
            finally:
                scored.clear()
                if name not in runner.num_prompt_logprobs:
                    del requested[name]
                runner.num_prompt_logprobs = requested
        return scores_by_name

    model.compute_logits = logits_of
    runner._get_prompt_logprobs_dict = one_by_one


def _leave_base_rows_alone(wrapper: Any) -> None:
    def patched(add: Callable[..., Any], adapter_of_row: Callable[[], Tensor]) -> Callable[..., Any]:
        def only_to_adapted(y: Tensor, *args: Any, **kwargs: Any) -> Any:
            base_rows = adapter_of_row()[: y.shape[0]] < 0
            before = y[base_rows].clone()
            added = add(y, *args, **kwargs)
            y[base_rows] = before
            return added

        return only_to_adapted

    wrapper.add_lora_linear = patched(wrapper.add_lora_linear, lambda: wrapper.token_lora_indices)
    wrapper.add_lora_logits = patched(wrapper.add_lora_logits, lambda: wrapper.sampler_indices)


def _end_with(server: int, starter: int) -> None:
    """`starter` started this process: the server, if this is the core; else the core."""
    core = os.getpid() if starter == server else starter
    try:
        opened = os.pidfd_open(server)
        if int(Path(f"/proc/{core}/stat").read_text().rpartition(")")[2].split()[1]) == server:
            select.select([opened], [], [])  # readable once the process has ended
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended
    if core == os.getppid():
        os.kill(core, signal.SIGKILL)
    os._exit(1)


_starter = multiprocessing.parent_process()
_server = os.environ.get(SERVER)  # noqa: TID251  nobody passes arguments to a module that vLLM looks up
if _starter is not None and _server is not None:  # in vLLM's processes
    threading.Thread(target=_end_with, args=(int(_server), _starter.pid), daemon=True).start()
