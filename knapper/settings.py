"""Every setting, read from `KNAPPER_*` variables, each with its reason. `knapper settings` prints them all.

Light on purpose: every process reads it first.
"""

import re
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from knapper.errors import InvalidField
from knapper.text.suggestions import did_you_mean

PREFIX = "KNAPPER_"
_QUEUE_PROXY_PORT = 8012  # in every Knative pod: enforces containerConcurrency, and reports to the autoscaler
_NAME = r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])"
_ADDRESS = re.compile(r"https?://[A-Za-z0-9.:\[\]-]{1,255}/?")


_RENAMED = {  # old name -> new one: a variable that is still set under its old name must not be ignored
    "KNAPPER_EXACT": "KNAPPER_BATCH_INVARIANT",
    "KNAPPER_JOB_QUIET_S": "KNAPPER_JOB_STALLED_S",
    "KNAPPER_MISCHIEF": "KNAPPER_FAULT_INJECTION_SEED",
    "KNAPPER_REST_S": "KNAPPER_RUN_IDLE_S",
    "KNAPPER_VLLM_REST_S": "KNAPPER_VLLM_IDLE_S",
    "KNAPPER_VLLM_SHELF": "KNAPPER_VLLM_ADAPTER_DIRECTORY",
}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one process; a child process inherits all of them through `environment()`."""

    data: Annotated[
        Path, Meta(description="Data that must survive restarts: the store, and run/ with locks and process states.")
    ]
    store: Annotated[
        str, Meta(description="The object store: empty for KNAPPER_DATA/store, or gs://BUCKET or gs://BUCKET/PREFIX.")
    ] = ""
    exchange: Annotated[
        str,
        Meta(description="Where inbox/ and jobs/ are: empty for KNAPPER_DATA, or gs://BUCKET or gs://BUCKET/PREFIX."),
    ] = ""
    cache: Annotated[Path, Meta(description="Downloaded and converted base models; can be deleted at any time.")]
    model: Annotated[
        str, Meta(min_length=1, description="The base model: a name, or a directory. The default runs on any laptop.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model_directory: Annotated[str, Meta(description="The model's files; `knapper up` and the images set it.")] = ""
    models: Annotated[
        str, Meta(description="A directory of model records that the gateway publishes; on a cluster a ConfigMap.")
    ] = ""
    train_step_url: Annotated[str, Meta(description="Where the gateway rings train_step; `knapper up` sets it.")] = ""
    sample_url: Annotated[str, Meta(description="Where the gateway sends sample requests; `knapper up` sets it.")] = ""
    reward_url: Annotated[str, Meta(description="Where the gateway sends rollouts; `knapper up` sets it.")] = ""
    broker_url: Annotated[
        str, Meta(description="Where events are posted: `knapper up` sets its own broker. Empty: jobs are off.")
    ] = ""
    gateway_url: Annotated[str, Meta(description="Where the local broker delivers; `knapper up` sets it.")] = ""
    subscription: Annotated[
        str,
        Meta(
            pattern="^(projects/[a-z0-9:.-]{1,64}/subscriptions/[A-Za-z0-9._~+%-]{3,255})?$",
            description="Announces uploads: projects/P/subscriptions/S. Empty: the inbox is polled.",
            title="projects/P/subscriptions/S, or empty",
        ),
    ] = ""
    events_host: Annotated[
        str, Meta(description="The cluster's own name for the gateway: it accepts events under no other.")
    ] = ""
    job_stalled_s: Annotated[
        float,
        Meta(
            ge=1, le=3600, description="Notify a job again after this long without progress: notifications can be lost."
        ),
    ] = 60.0
    fault_injection_seed: Annotated[
        str,
        Meta(
            pattern="^[0-9]{0,9}$",
            description="A random seed, for tests: the local broker duplicates, drops and delays events.",
            title="a whole number of at most 9 digits, or empty",
        ),
    ] = ""
    host: Annotated[
        str, Meta(min_length=1, description="The address to listen on; beyond loopback only with KNAPPER_KEYS=true.")
    ] = "127.0.0.1"
    hosts: Annotated[
        str,
        Meta(
            pattern=f"^({_NAME}(,{_NAME}){{0,63}})?$",
            description="Without keys: host names to answer to besides this machine's own; their pages may call.",
            title="names without ports, separated by commas, or empty",
        ),
    ] = ""
    port: Annotated[int, Meta(ge=0, le=65535, description="The gateway's port; 0 takes a free one.")] = 8000
    device: Annotated[
        Literal["auto", "cuda", "mps", "cpu"],
        Meta(description="The device; auto: cuda, else cpu. mps is untested: docs/models.md; vLLM: docs/vllm.md."),
    ] = "auto"
    devices: Annotated[int, Meta(ge=1, le=64, description="The base model is spread over so many: docs/ranks.md.")] = 1
    rank_timeout_s: Annotated[
        float, Meta(gt=0, le=86400, description="A device of several that takes longer is lost, and all start anew.")
    ] = 600.0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Meta(description="Of the base weights; auto: the faster one, measured. A run keeps its own: docs/models.md."),
    ] = "auto"
    context: Annotated[
        int, Meta(ge=0, le=10**7, description="Tokens of a text at most; 0: as many as the model's own context has.")
    ] = 0
    threads: Annotated[
        int,
        Meta(
            ge=0,
            le=1024,
            description="Torch's threads on a CPU; 0: torch's default. The bits of a replay depend on it.",
        ),
    ] = 0
    batch_invariant: Annotated[
        Literal["auto", "true", "false"], Meta(description="A row's bits are its own; auto: on a CPU: docs/gpu.md.")
    ] = "auto"
    gpu_memory_share: Annotated[
        float,
        Meta(gt=0, le=1, description="The engine's part of a GPU's memory. vLLM on the same card has the rest of it."),
    ] = 1.0
    engines: Annotated[
        int, Meta(ge=1, le=64, description="Engines that share this machine, one a base model; `knapper up` sets it.")
    ] = 1
    kv_memory: Annotated[
        float,
        Meta(
            ge=0,
            le=0.9,
            description="The fraction of the memory left by the weights that sampling's KV cache uses; 0: a quarter, "
            "or what one sequence of the full context needs, up to three quarters.",
        ),
    ] = 0.0
    sampler: Annotated[
        Literal["auto", "torch", "vllm"],
        Meta(description="The sampling backend, the engine's own or vLLM; auto: vLLM on a GPU that can: docs/vllm.md."),
    ] = "auto"
    vllm_rank: Annotated[
        int, Meta(ge=1, le=256, description="The highest adapter rank that vLLM accepts; a higher one costs memory.")
    ] = 64
    vllm_adapters: Annotated[
        int, Meta(ge=1, le=64, description="Adapters in one batch of vLLM; each takes memory by KNAPPER_VLLM_RANK.")
    ] = 8
    vllm_memory: Annotated[
        float,
        Meta(ge=0, le=1, description="vLLM's fraction of a GPU's memory; 0: what training leaves, or 0.9 alone."),
    ] = 0.0
    vllm_idle_s: Annotated[
        float, Meta(ge=0, le=86400, description="Idle time until vLLM sleeps; 0: never. Unset: 10 beside training.")
    ] = 0.0
    vllm_adapter_directory: Annotated[
        Path, Meta(description="An in-memory file system for vLLM's adapters; each process has a directory there.")
    ] = Path("/dev/shm")
    idle_s: Annotated[
        float,
        Meta(
            gt=0,
            le=7 * 86400,
            description="Idle time after which a function's process ends; the next call starts it again.",
        ),
    ] = 300.0
    run_idle_s: Annotated[
        float, Meta(ge=0, le=86400, description="Idle time after which a run leaves the engine's memory; 0 disables.")
    ] = 120.0
    keep_results_s: Annotated[
        float,
        Meta(
            gt=0,
            le=30 * 86400,
            description="A result that no recovery needs is kept this long, for clients that poll late.",
        ),
    ] = 3600.0
    keep_samplers_s: Annotated[
        float,
        Meta(
            gt=0,
            le=30 * 86400,
            description="Superseded weights of an unnamed sampler are kept this long after their last use.",
        ),
    ] = 900.0
    keep_orphans_s: Annotated[
        float,
        Meta(
            gt=0,
            le=30 * 86400,
            description="Unreferenced files are kept this long, so that loads in progress can finish.",
        ),
    ] = 3600.0
    keep_finished_s: Annotated[
        float,
        Meta(
            gt=0,
            le=3650 * 86400,
            description="A run's state is kept this long after its session ended; checkpoints stay.",
        ),
    ] = 86400.0
    keep_records_s: Annotated[
        float,
        Meta(
            gt=0,
            le=3650 * 86400,
            description="A session without checkpoints, and its runs, stay listed this long after it ended.",
        ),
    ] = 30 * 86400.0
    pod_ip: Annotated[
        str,
        Meta(description="This pod's IP: gateways reach a train_step, or each other, there at queue-proxy (8012)."),
    ] = ""
    holder_address: Annotated[
        str,
        Meta(description="The same as a URL, for a process that is no pod. Both empty: only its service reaches it."),
    ] = ""
    pod_snapshot: Annotated[
        str,
        Meta(
            description="Where a loaded function asks for a snapshot of its pod: /proc/gvisor/checkpoint; empty: off."
        ),
    ] = ""
    keys: Annotated[
        bool, Meta(description="Accept only keys of `knapper key create`. Off: any key, from this machine alone.")
    ] = False
    quotas: Annotated[
        str,
        Meta(
            description="A file of all tenants' quotas, applied whenever it changes; empty: `knapper quota` sets them."
        ),
    ] = ""
    currency: Annotated[
        str,
        Meta(pattern="^[A-Z]{3}$", description="Of the prices below.", title="three capital letters, such as USD"),
    ] = "USD"
    price_trained: Annotated[
        float, Meta(ge=0, le=1e9, description="A million trained tokens; usage and bills then show amounts.")
    ] = 0.0
    price_prefilled: Annotated[float, Meta(ge=0, le=1e9, description="A million tokens of prompts.")] = 0.0
    price_sampled: Annotated[float, Meta(ge=0, le=1e9, description="A million sampled tokens.")] = 0.0
    price_device_second: Annotated[
        float, Meta(ge=0, le=1e9, description="A second of the device, beside or in place of prices for tokens.")
    ] = 0.0
    price_stored: Annotated[float, Meta(ge=0, le=1e9, description="A GiB of checkpoints for a month.")] = 0.0
    jwt: Annotated[
        bool,
        Meta(description="Clients exchange keys for tokens that last an hour: no request carries a lasting secret."),
    ] = False
    admin: Annotated[str, Meta(description="The tenant that sees all tenants in the console; empty: none.")] = ""
    notice: Annotated[
        str,
        Meta(
            pattern="^[ -~]{0,500}$",
            description="A line that every client prints when it starts, such as planned downtime.",
            title="at most 500 printable ASCII characters",
        ),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="The lowest level that is written to stderr.")
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        Meta(description="The format of stderr: text for people, json (one object a line) for a log service."),
    ] = "text"
    traces: Annotated[
        str, Meta(description="The OTLP collector (HTTP) for traces, as http://collector:4318; empty: off.")
    ] = ""

    @staticmethod
    def load(environ: Mapping[str, str]) -> "Settings":
        """The settings of this environment.

        Raises InvalidField for a wrong value, and for a KNAPPER_ variable that is unknown or has another name now.
        """
        types = {field.name: field.type for field in msgspec.structs.fields(Settings)}
        fields = {variable(name): name for name in types}
        values: dict[str, Any] = default_directories(environ)
        if "K_SERVICE" in environ:  # Knative's container contract: listen on every address
            values["host"] = "0.0.0.0"
        for name, text in environ.items():
            if name.startswith(PREFIX):
                if name not in fields:
                    raise _unknown(name, fields)
                values[fields[name]] = _convert(name, text, types[fields[name]])
        return Settings(**values)

    def expect_keys_beyond_loopback(self) -> None:
        """Raises InvalidField if other machines could reach a gateway that asks for no keys."""
        if not self.keys and not _is_loopback(self.host):
            raise InvalidField(
                variable("host"), self.host, "127.0.0.1, ::1 or localhost while KNAPPER_KEYS is false",
                "To serve other machines, set KNAPPER_KEYS=true, and make a key for each user "
                "with `knapper key create TENANT`",
            )  # fmt: skip

    @property
    def address(self) -> str:
        """The URL for doorbells to this very process; empty if only its service has one. Raises InvalidField."""
        if self.holder_address:
            if not _ADDRESS.fullmatch(self.holder_address):
                raise InvalidField(variable("holder_address"), self.holder_address, "http://HOST:PORT, or empty")
            return self.holder_address.rstrip("/")
        if not self.pod_ip:
            return ""
        try:
            ip = ip_address(self.pod_ip)
        except ValueError as error:
            raise InvalidField(variable("pod_ip"), self.pod_ip, "an IP address, or empty") from error
        return f"http://{f'[{ip}]' if ip.version == 6 else ip}:{_QUEUE_PROXY_PORT}"

    @property
    def store_directory(self) -> Path:
        return self.data / "store"

    @property
    def run_directory(self) -> Path:
        """Locks and states of running processes; worthless once they end."""
        return self.data / "run"

    def environment(self) -> dict[str, str]:
        """The variables from which `load` makes equal settings."""
        return {variable(name): str(getattr(self, name)) for name in self.__struct_fields__}


class SettingDescription(msgspec.Struct, frozen=True):
    """One setting, for people."""

    variable: str
    value: str
    source: str
    reason: str


def describe(environ: Mapping[str, str]) -> list[SettingDescription]:
    """All settings with their sources and reasons."""
    settings = Settings.load(environ)
    return [
        SettingDescription(
            variable(field.name),
            str(getattr(settings, field.name)),
            "environment" if variable(field.name) in environ else "default",
            get_args(field.type)[1].description,
        )
        for field in msgspec.structs.fields(Settings)
    ]


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.upper()


def default_directories(environ: Mapping[str, str]) -> dict[str, Path]:
    """Data and cache directories of the XDG specification: the same from every working directory."""
    home = Path(environ.get("HOME") or "/")
    return {
        "data": Path(environ.get("XDG_DATA_HOME") or home / ".local/share") / "knapper",
        "cache": Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "knapper/models",
    }


def _unknown(name: str, known: Iterable[str]) -> InvalidField:
    if name in _RENAMED:
        return InvalidField("environment variable", name, _RENAMED[name], f"Set {_RENAMED[name]} in its place")
    todo = f"{did_you_mean(name, known)} Correct its name, or unset it".strip()
    return InvalidField("environment variable", name, ", ".join(known), todo)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _convert(name: str, text: str, kind: Any) -> Any:
    if get_args(kind)[0] is Path:
        if not text:
            raise InvalidField(name, text, "a directory")
        return Path(text).expanduser().absolute()
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidField(name, text, _allowed(kind)) from error


def _allowed(kind: Any) -> str:
    base, meta = get_args(kind)
    if choices := get_args(base):
        return ", ".join(choices)
    if base is bool:
        return "true or false"
    if base is str:
        return meta.title or "a text that is not empty"  # the title says in words what a pattern allows
    least = f"from {meta.ge}" if meta.ge is not None else f"above {meta.gt}"
    return f"a {'whole ' if base is int else ''}number {least} to {meta.le}"
