"""Every knob, read from `KNAPPER_*` variables, each with its reason. `knapper settings` prints them all.

Light on purpose: every process reads it first.
"""

import re
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from knapper.errors import InvalidField
from knapper.text.suggestions import did_you_mean

PREFIX = "KNAPPER_"
_QUEUE_PROXY_PORT = 8012  # of every Knative pod: it keeps to containerConcurrency, and counts for the autoscaler
_NAME = r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])"
_ADDRESS = re.compile(r"https?://[A-Za-z0-9.:\[\]-]{1,255}/?")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One process's settings; a child process gets them whole, as `environment()`."""

    data: Annotated[Path, Meta(description="Everything that must survive: the store, and run/ with locks and states.")]
    store: Annotated[
        str, Meta(description="Where the store is: empty for KNAPPER_DATA/store, or gs://BUCKET or gs://BUCKET/PREFIX.")
    ] = ""
    exchange: Annotated[
        str,
        Meta(description="Where inbox/ and jobs/ are: empty for KNAPPER_DATA, or gs://BUCKET or gs://BUCKET/PREFIX."),
    ] = ""
    cache: Annotated[
        Path, Meta(description="Base models that were downloaded or converted; can be deleted at any time.")
    ]
    model: Annotated[
        str, Meta(min_length=1, description="The base model: a name, or a directory. The default runs on any laptop.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model_directory: Annotated[
        str, Meta(description="Where the model's files lie; `knapper up` finds it out, an image sets it.")
    ] = ""
    models: Annotated[
        str, Meta(description="A directory of model records that the gateway publishes; on a cluster a ConfigMap.")
    ] = ""
    train_step_url: Annotated[str, Meta(description="Where the gateway rings for training; `knapper up` sets it.")] = ""
    sample_url: Annotated[str, Meta(description="Where the gateway rings for samples; `knapper up` sets it.")] = ""
    reward_url: Annotated[str, Meta(description="Where the gateway sends rollouts to score; `knapper up` sets it.")] = (
        ""
    )
    broker_url: Annotated[
        str, Meta(description="Where events are posted; `knapper up` sets its own broker's address. Empty: no jobs.")
    ] = ""
    gateway_url: Annotated[
        str, Meta(description="Where the local broker delivers to the gateway; `knapper up` sets its address.")
    ] = ""
    subscription: Annotated[
        str,
        Meta(
            pattern="^(projects/[a-z0-9:.-]{1,64}/subscriptions/[A-Za-z0-9._~+%-]{3,255})?$",
            description="Tells of uploads: projects/P/subscriptions/S. Empty: the inbox is looked into.",
            title="projects/P/subscriptions/S, or empty",
        ),
    ] = ""
    events_host: Annotated[
        str,
        Meta(description="The name under which a cluster's own services reach the gateway: it takes events there."),
    ] = ""
    job_quiet_s: Annotated[
        float,
        Meta(ge=1, le=3600, description="A job that has not moved for so long is rung for again: a bell may be lost."),
    ] = 60.0
    mischief: Annotated[
        str,
        Meta(
            pattern="^[0-9]{0,9}$",
            description="A seed: the local broker then doubles, drops and delays events, as a test.",
            title="a whole number of at most 9 digits, or empty",
        ),
    ] = ""
    host: Annotated[
        str, Meta(min_length=1, description="Where the gateway listens; beyond loopback only with KNAPPER_KEYS=true.")
    ] = "127.0.0.1"
    hosts: Annotated[
        str,
        Meta(
            pattern=f"^({_NAME}(,{_NAME}){{0,63}})?$",
            description="Without keys: more names to answer by, beside this machine's own, and whose pages may call.",
            title="names without ports, separated by commas, or empty",
        ),
    ] = ""
    port: Annotated[int, Meta(ge=0, le=65535, description="The gateway's port; 0 takes a free one.")] = 8000
    device: Annotated[
        Literal["auto", "cuda", "mps", "cpu"],
        Meta(description="What computes; auto: cuda, else cpu. mps was never run: docs/models.md; vLLM: docs/vllm.md."),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Meta(description="Of the base weights; auto: the faster one, measured. A run keeps its own: docs/models.md."),
    ] = "auto"
    threads: Annotated[
        int,
        Meta(ge=0, le=1024, description="Of torch on a CPU; 0: as many as torch takes. Replayed bits depend on it."),
    ] = 0
    exact: Annotated[
        bool,
        Meta(description="On a CPU, bits do not depend on neighbours; false gives that up, for speed on some CPUs."),
    ] = True
    gpu_memory_share: Annotated[
        float,
        Meta(gt=0, le=1, description="The part of a GPU's memory that the engine takes; less where others share it."),
    ] = 1.0
    kv_memory: Annotated[
        float,
        Meta(
            ge=0,
            le=0.9,
            description="The part of the memory that weights leave which keys and values of samples take; 0: "
            "a quarter, or what one text of the whole context needs, up to three.",
        ),
    ] = 0.0
    sampler: Annotated[
        Literal["torch", "vllm"],
        Meta(description="Who samples: the engine itself, or vLLM in an environment of its own: docs/vllm.md."),
    ] = "torch"
    vllm_rank: Annotated[
        int, Meta(ge=1, le=256, description="The highest rank of adapters that vLLM makes room for: it costs memory.")
    ] = 64
    vllm_adapters: Annotated[
        int,
        Meta(ge=1, le=64, description="Different adapters in one batch of vLLM; each takes memory by vllm_rank."),
    ] = 8
    vllm_memory: Annotated[
        float, Meta(gt=0, le=1, description="The part of a GPU that vLLM takes; less where train_step shares it.")
    ] = 0.9
    vllm_rest_s: Annotated[
        float,
        Meta(ge=0, le=86400, description="vLLM without samples for so long gives its memory back; 0: never."),
    ] = 0.0
    vllm_shelf: Annotated[
        Path, Meta(description="A memory file system where vLLM reads adapters; each process has a directory there.")
    ] = Path("/dev/shm")
    idle_s: Annotated[
        float,
        Meta(
            gt=0,
            le=7 * 86400,
            description="A function that nobody calls for so long ends; the next call starts it.",
        ),
    ] = 300.0
    rest_s: Annotated[
        float,
        Meta(ge=0, le=86400, description="A run without bells for so long leaves a living engine's memory; 0: never."),
    ] = 120.0
    keep_results_s: Annotated[
        float,
        Meta(
            gt=0,
            le=30 * 86400,
            description="An answer that no recovery needs stays so long after its commit, for clients that poll late.",
        ),
    ] = 3600.0
    keep_samplers_s: Annotated[
        float,
        Meta(
            gt=0,
            le=30 * 86400,
            description="Weights of an unnamed sampler that newer ones superseded stay so long after the last use.",
        ),
    ] = 900.0
    keep_orphans_s: Annotated[
        float,
        Meta(
            gt=0,
            le=30 * 86400,
            description="Files that nothing leads to any more stay so long, so that loads under way come to their end.",
        ),
    ] = 3600.0
    keep_finished_s: Annotated[
        float,
        Meta(
            gt=0,
            le=3650 * 86400,
            description="The state of a run stays so long after its session ended; its checkpoints stay anyway.",
        ),
    ] = 86400.0
    keep_records_s: Annotated[
        float,
        Meta(
            gt=0,
            le=3650 * 86400,
            description="A session without checkpoints is listed so long after it ended, and so are its runs.",
        ),
    ] = 30 * 86400.0
    pod_ip: Annotated[
        str, Meta(description="A train_step pod's own IP: the gateway rings it there, at Knative's queue-proxy (8012).")
    ] = ""
    holder_address: Annotated[
        str, Meta(description="The same as a URL, of a process that is no pod. Empty both: rung at its service only.")
    ] = ""
    keys: Annotated[
        bool,
        Meta(
            description="Only keys made by `knapper key create` open the API. Off: any key does, on this machine alone."
        ),
    ] = False
    jwt: Annotated[
        bool,
        Meta(
            description="Clients exchange their keys for tokens of an hour, so that requests carry no lasting secret."
        ),
    ] = False
    notice: Annotated[
        str,
        Meta(
            pattern="^[ -~]{0,500}$",
            description="What every client prints once when it starts, for example when this server will be down.",
            title="at most 500 printable ASCII characters",
        ),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="The least that is written to stderr.")
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"], Meta(description="Of stderr: lines for people, or an object a line for a log service.")
    ] = "text"
    traces: Annotated[
        str, Meta(description="An OTLP collector (HTTP) that gets traces, as http://collector:4318; empty: none does.")
    ] = ""

    @staticmethod
    def load(environ: Mapping[str, str]) -> "Settings":
        """The settings of this environment. Raises InvalidField for a wrong value or an unknown KNAPPER_ variable."""
        types = {field.name: field.type for field in msgspec.structs.fields(Settings)}
        known = {variable(name): name for name in types}
        values: dict[str, Any] = default_directories(environ)
        if "K_SERVICE" in environ:  # Knative's container contract: it listens on every address
            values["host"] = "0.0.0.0"
        for given, text in environ.items():
            if given.startswith(PREFIX):
                if given not in known:
                    todo = f"{did_you_mean(given, known)} Correct its name, or unset it".strip()
                    raise InvalidField("environment variable", given, ", ".join(known), todo)
                values[known[given]] = _convert(given, text, types[known[given]])
        return Settings(**values)

    def expect_keys_beyond_loopback(self) -> None:
        """Raises InvalidField where others than this machine's users could reach a gateway that asks for no keys."""
        if not self.keys and not _is_loopback(self.host):
            raise InvalidField(
                variable("host"), self.host, "127.0.0.1, ::1 or localhost while KNAPPER_KEYS is false",
                "To serve other machines, set KNAPPER_KEYS=true, and make a key for each user "
                "with `knapper key create TENANT`",
            )  # fmt: skip

    @property
    def address(self) -> str:
        """Where this very process can be rung; empty if only its service can. Raises InvalidField."""
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
        """Locks and states of running processes: of no use after them."""
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
    """Data and cache where the XDG specification wants them: one place a user, whatever the working directory."""
    home = Path(environ.get("HOME") or "/")
    return {
        "data": Path(environ.get("XDG_DATA_HOME") or home / ".local/share") / "knapper",
        "cache": Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "knapper/models",
    }


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
        return meta.title or "a text that is not empty"  # a pattern has its words there
    least = f"from {meta.ge}" if meta.ge is not None else f"above {meta.gt}"
    return f"a {'whole ' if base is int else ''}number {least} to {meta.le}"
