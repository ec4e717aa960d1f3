"""The JSON requests and the queries of the REST group: lists, checkpoints, sessions, audit and usage.

Field names and defaults are the SDK's.
"""

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from knapper import ids, limits
from knapper.errors import InvalidField
from knapper.ids import RunId
from knapper.wire.fields import AccessToken, Id, Labels, Number, Path, RequestBody, Text, Ttl

Scope = Literal["owned", "accessible"]  # the same here: a tenant may read only its own
Offset = Annotated[int, Meta(ge=0, le=limits.offset_max)]
PageSize = Annotated[int, Meta(ge=1, le=limits.page_max)]
Project = Annotated[str, Meta(min_length=1, max_length=limits.project_chars_max)]


class Access(RequestBody, frozen=True, kw_only=True):
    """The query of one run or session."""

    access_scope: Scope = "owned"


class Page(RequestBody, frozen=True, kw_only=True):
    """The query of a list of sessions."""

    limit: PageSize = 20
    offset: Offset = 0
    access_scope: Scope = "owned"


class RunsPage(Page, frozen=True, kw_only=True):
    project_id: Project | None = None


class CheckpointsPage(RequestBody, frozen=True, kw_only=True):
    limit: PageSize = 100
    offset: Offset = 0


class EpisodesPage(RequestBody, frozen=True, kw_only=True):
    limit: PageSize = 100
    offset: Offset = 0


class TurnsQuery(RequestBody, frozen=True, kw_only=True):
    """`after`: the id of a turn, for those that were kept later."""

    limit: Annotated[int, Meta(ge=1, le=limits.turns_listed_max)] = 20
    after: Annotated[str, Meta(max_length=limits.id_chars_max)] = ""


class ScoreChange(RequestBody, frozen=True, kw_only=True):
    score: Annotated[float, Meta(ge=-limits.episode_score_max, le=limits.episode_score_max)]


class TtlChange(RequestBody, frozen=True, kw_only=True):
    """null removes it. The field is required, so that a misspelt one cannot remove it."""

    ttl_seconds: Ttl | None


class WeightsInfo(RequestBody, frozen=True, kw_only=True):
    tinker_path: Path


class CopyWeights(RequestBody, frozen=True, kw_only=True):
    source_path: Path
    session_id: Id | None = None
    model_seq_id: Number | None = None
    destination_project_id: Project | None = None
    ttl_seconds: Ttl | None = None
    weights_access_token: AccessToken | None = None

    def run(self) -> RunId | None:
        """The run that it names, or None for a project, in which a session is created. Raises InvalidField."""
        names_run = self.session_id is not None and self.model_seq_id is not None
        if names_run and self.destination_project_id is None:
            return ids.make_run_id(ids.session_id(self.session_id or ""), self.model_seq_id or 0)
        if self.session_id is None and self.model_seq_id is None and self.destination_project_id is not None:
            return None
        names = ("session_id", "model_seq_id", "destination_project_id")
        present = [name for name in names if getattr(self, name) is not None]
        raise InvalidField("copy_weights", present, "destination_project_id, or session_id with model_seq_id")


class SessionProject(RequestBody, frozen=True, kw_only=True):
    project_id: Project


class Own(RequestBody, frozen=True, kw_only=True, tag="own"):
    pass


class Accessible(RequestBody, frozen=True, kw_only=True, tag="accessible"):
    pass


class Users(RequestBody, frozen=True, kw_only=True, tag="user"):
    owner_urns: Annotated[list[Text], Meta(min_length=1, max_length=limits.search_owners_max)]


class Active(RequestBody, frozen=True, kw_only=True, tag="active"):
    pass


class Cancelled(RequestBody, frozen=True, kw_only=True, tag="cancelled"):
    pass


class Failed(RequestBody, frozen=True, kw_only=True, tag="failed"):
    pass


class ClientFinished(RequestBody, frozen=True, kw_only=True, tag="client_finished"):
    reasons: Annotated[list[Literal["success", "errored", "interrupted"]], Meta(min_length=1)] | None = None


Status = Active | Cancelled | Failed | ClientFinished


class Cursor(RequestBody, frozen=True, kw_only=True):
    last_created_at: Annotated[datetime, Meta(tz=True)]
    last_session_id: Id


class SessionSearch(RequestBody, frozen=True, kw_only=True):
    session_id: Id | None = None
    project_ids: Annotated[list[Project], Meta(max_length=limits.search_projects_max)] | None = None
    user_metadata: Labels = {}
    display_name: Annotated[str, Meta(min_length=1, max_length=limits.text_chars_max)] | None = None
    owner: Own | Accessible | Users = msgspec.field(default_factory=Own)
    statuses: Annotated[list[Status], Meta(min_length=1, max_length=limits.search_statuses_max)] | None = None
    limit: Annotated[int, Meta(ge=1, le=limits.sessions_found_max)] = 50
    cursor: Cursor | None = None


class CheckpointCursor(RequestBody, frozen=True, kw_only=True):
    last_created_at: Annotated[datetime, Meta(tz=True)]
    last_checkpoint_uuid: Path


class CheckpointSearch(RequestBody, frozen=True, kw_only=True):
    project_ids: Annotated[list[Project], Meta(max_length=limits.search_projects_max)] | None = None
    user_metadata: Labels = {}
    checkpoint_type: Literal["training", "sampler", "external"] | None = None
    owner: Own | Accessible | Users = msgspec.field(default_factory=Own)
    base_models: Annotated[list[Text], Meta(max_length=limits.search_models_max)] | None = None
    limit: Annotated[int, Meta(ge=1, le=limits.checkpoints_found_max)] = 50
    cursor: CheckpointCursor | None = None


class AuditQuery(RequestBody, frozen=True, kw_only=True):
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all"
    day: Annotated[str, Meta(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None


class UsageQuery(RequestBody, frozen=True, kw_only=True):
    starting_on: Annotated[datetime, Meta(tz=True)]
    ending_before: Annotated[datetime, Meta(tz=True)]

    def hours(self, now: float) -> tuple[int, int]:
        """[first, end) in hours since the epoch. Raises InvalidField for an invalid window, or one of partial hours.

        `now`: seconds since the epoch.
        """
        window = []
        for name in ("starting_on", "ending_before"):
            at: datetime = getattr(self, name)
            if at.timestamp() % 3600:
                raise InvalidField(name, at.isoformat(), "a full hour, in UTC")
            window.append(int(at.timestamp() // 3600))
        first, end = window
        if first * 3600 > now:
            raise InvalidField("starting_on", self.starting_on.isoformat(), "a time that is not in the future")
        if not first < end <= first + 24 * limits.usage_days_max:
            allowed = f"after starting_on, and at most {limits.usage_days_max} days"
            raise InvalidField("ending_before", self.ending_before.isoformat(), allowed)
        return first, end


class StorageQuery(RequestBody, frozen=True, kw_only=True):
    project_id: Project | None = None
