"""The files of a checkpoint, fetched over REST; what is there already, or broke off, is not fetched again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

from knapper.cli import jobs_transfer
from knapper.cli.jobs_client import JobsClient
from knapper.errors import UserError
from knapper.export import space
from knapper.ids import TinkerPath
from knapper.jobs import names

Say = Callable[[str], None]


def path_of(client: JobsClient, named: str) -> TinkerPath:
    """The checkpoint of that tinker:// path, or of the job of that name. Raises UserError for a job without one."""
    if named.startswith("tinker://"):
        return TinkerPath.parse(named, "CHECKPOINT")
    job = client.show(names.job(named))
    if not job.get("checkpoint"):
        raise UserError(
            f"job {named} is {job['state']} and has no checkpoint yet; `knapper jobs show {named}` says more"
        )
    return TinkerPath.parse(job["checkpoint"], "CHECKPOINT")


def fetch(client: JobsClient, path: TinkerPath, wanted: Sequence[str], folder: Path, say: Say) -> str:
    """Fetch those files of the checkpoint into the folder. Returns its base model's name."""
    at = f"training_runs/{quote(path.run)}/checkpoints/{path.kind}/{quote(path.name)}/files"
    listed = client.ask("GET", at)
    files = {file["name"]: file for file in listed["files"]}
    space.expect_disk(folder, sum(file["size"] for name, file in files.items() if name in wanted), "the adapter")
    for name in wanted:
        if name not in files:
            raise UserError(f"checkpoint {path} has no file {name}; it has: {', '.join(files)}")
        fetched = jobs_transfer.fetch(
            client, f"{at}/{name}", files[name] | {"etag": files[name]["sha256"]}, folder / name
        )
        if fetched is None:
            raise UserError(f"{path} was saved anew while {name} was downloaded; start again")
        say(f"{folder / name}{'' if fetched else ' was already there'}")
    return str(listed["base_model"])
