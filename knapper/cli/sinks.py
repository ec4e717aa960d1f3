"""`--log-to`: a run's or a job's points go on to TensorBoard, trackio or W&B, each by its own library.

Points come from the journal, or the job's records, and what is there already is read from where they go: a command
that is started again goes on behind the newest step that arrived, so that no point is lost and none is there twice.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from knapper.errors import InvalidField

_NO_METRICS: Final = frozenset({"step", "at"})
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
ALLOWED: Final = "tensorboard:DIRECTORY, trackio:PROJECT or wandb:PROJECT"


class Sink(Protocol):
    def newest(self) -> int:
        """The newest step that it has; -1 for none."""

    def write(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """A point is whole or not there. `at`: seconds since the epoch."""

    def close(self) -> None: ...


class Forwarder:
    """Sends each new point of one run to all sinks."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = [(sink, [sink.newest()]) for sink in sinks]

    def send(self, points: Sequence[Mapping[str, Any]]) -> None:
        for sink, newest in self._sinks:
            for point in points:
                step = int(point["step"])
                if step > newest[0]:
                    sink.write(step, float(point["at"]), values_of(point))
                    newest[0] = step

    def close(self) -> None:
        for sink, _ in self._sinks:
            sink.close()


def values_of(point: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in point.items() if name not in _NO_METRICS}


def opened(address: str, run: str) -> Sink:
    """The sink of an address, for one run. Raises InvalidField."""
    kind, _, place = address.partition(":")
    sinks: dict[str, Callable[[str, str], Sink]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}
    if kind not in sinks or not place:
        raise InvalidField("--log-to", address, ALLOWED)
    if kind != "tensorboard" and not _NAME.fullmatch(place):
        raise InvalidField("--log-to", address, f"{ALLOWED}; a project has up to 128 letters, digits, '.', '_' and '-'")
    return sinks[kind](place, run.replace(":", "-"))


class TensorBoard:
    """Event files in a folder of the run's. A point is one record, which a reader takes whole or not at all."""

    def __init__(self, directory: str, run: str) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._directory = Path(directory) / run
        self._newest = self._read()
        self._writer = EventFileWriter(str(self._directory))

    def newest(self) -> int:
        return self._newest

    def write(self, step: int, at: float, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.add_event(Event(wall_time=at, step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _read(self) -> int:
        if not self._directory.is_dir():
            return -1
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self._directory), size_guidance={"scalars": 0})
        events.Reload()
        return max((each.step for tag in events.Tags()["scalars"] for each in events.Scalars(tag)), default=-1)


class Trackio:
    """trackio's database on this machine."""

    def __init__(self, project: str, run: str) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        newest = SQLiteStorage.get_max_step_for_run(project, run)
        self._newest = -1 if newest is None else int(newest)
        self._run: Any = trackio.init(project=project, name=run, resume="allow", embed=False)

    def newest(self) -> int:
        return self._newest

    def write(self, step: int, at: float, values: Mapping[str, float]) -> None:
        self._run.log({**values, "at": at}, step=step)

    def close(self) -> None:
        self._run.finish()


class Wandb:
    """W&B, with the key and the mode that its own variables say. It refuses steps that it has."""

    def __init__(self, project: str, run: str) -> None:
        import wandb

        self._run = wandb.init(project=project, id=run, name=run, resume="allow")

    def newest(self) -> int:
        return int(self._run.step) - 1

    def write(self, step: int, at: float, values: Mapping[str, float]) -> None:
        self._run.log({**values, "at": at}, step=step, commit=True)

    def close(self) -> None:
        self._run.finish()
