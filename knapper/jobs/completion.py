"""The end of a job: the adapter gets its permanent name, and all outputs are published."""

import structlog

from knapper.errors import Corrupt
from knapper.ids import TinkerPath
from knapper.jobs import control, outputs, sample_usage
from knapper.jobs.bill import bill
from knapper.jobs.job_files import Folder
from knapper.jobs.names import FINAL, STEP, step_name
from knapper.jobs.recipes import RunClients
from knapper.jobs.selection import Ending
from knapper.jobs.services import JobServices
from knapper.jobs.worker import Stopped
from knapper.state.checkpoints import Checkpoints
from knapper.state.job_records import Trained, read
from knapper.state.journal import bundles
from knapper.state.sessions import Finish, Sessions
from knapper.store import many

log = structlog.get_logger()
_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})


async def write(
    services: JobServices, checkpoints: Checkpoints, folder: Folder, clients: RunClients, steps: int, ending: Ending
) -> None:
    """`steps`: trained. Safe to interrupt and repeat. Raises Stopped if the job was cancelled at the last moment."""
    start, store = folder.start, services.store
    if ending.version != steps:
        await clients.run.load(str(TinkerPath(start.run, "weights", step_name(ending.version))))
    adapter = TinkerPath.parse(await clients.run.save_for_sampler(FINAL))
    await clients.run.save(FINAL)
    index, files = await bundles.read(store, (await checkpoints.own(adapter, start.tenant)).bundle, _FILES)
    for name, data in files.items():
        await services.exchange.publish(outputs.where(start, f"adapter/{name}"), data)
    await outputs.publish_evaluations(services, folder, steps)
    trained = await many.each(range(steps), lambda step: _trained(services, folder, step))
    evaluated = (await outputs.evaluations(store, start)).values()
    size = sum(part.size for part in index.parts if part.name in _FILES)
    await sample_usage.after_all(store, folder, trained[-1])
    now = services.clock()
    total = bill(folder, [*trained, *evaluated], clients.device_s, size, now, services.prices)
    await outputs.publish_bill(services, folder, total)
    if not await control.change(store, start, "completed", ending.reason, services.clock()):
        raise Stopped
    for kind in ("sampler_weights", "weights"):
        for checkpoint in await checkpoints.listed(start.tenant, within=f"{start.run}/{kind}/{STEP}"):
            await checkpoints.delete(TinkerPath.parse(checkpoint.path), start.tenant)
    took_s = round(services.clock() - folder.started.started_at)
    log.info("job completed", job=str(start), steps=steps, took_s=took_s, adapter=str(adapter))
    finish = Finish(reason="success", detail="the job is completed", finished_at=services.clock())
    await Sessions(store).finish(start.session, finish)
    await store.delete(start.working)
    await outputs.publish_status(services, folder.started)


async def _trained(services: JobServices, folder: Folder, step: int) -> Trained:
    record = await read(services.store, folder.start.trained(step), Trained)
    if record is None:
        raise Corrupt(f"object {folder.start.trained(step)} is missing")
    return record
