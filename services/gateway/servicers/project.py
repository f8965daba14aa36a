"""ProjectService: who owns keys, quotas and books."""

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.admin.v1 import project_pb2 as pb
from argosy.v1 import deletion_pb2
from services.chassis import bounds, lists
from services.chassis.errors import ResourceExists, ResourceNotFound, WrongState
from services.gateway import records
from services.gateway.records import Row
from services.gateway.servicers.resources import PROJECT_NAME, Desk, Owner, caller, owner, paths, segments, timestamp

SERVICE = "argosy.admin.v1.ProjectService"
STATES = frozenset({"ACTIVE", "SUSPENDED"})
ORDERS = frozenset({"name", "create_time", "update_time", "display_name"})
MUTABLE = ("display_name", "labels")


def shown(row: Row) -> pb.Project:
    """A project as its message."""
    return pb.Project(
        name=f"projects/{row['name']}",
        uid=row["uid"],
        display_name=row["display_name"],
        labels=row["labels"],
        etag=lists.etag(row["uid"], row["revision"]),
        state=pb.Project.State.Value(f"STATE_{row['state']}"),
        create_time=timestamp(row["create_time"]),
        update_time=timestamp(row["update_time"]),
    )


async def _found(connection: AsyncConnection, name: str, field: str = "name", *, lock: bool = True) -> Row:
    (segment,) = segments(name, PROJECT_NAME, field)
    await owner(connection, segment, field)
    row = await records.project(connection, segment, lock=lock)
    if row is None:
        raise ResourceNotFound(field)
    return row


def _about(row: Row) -> tuple[Owner, str]:
    return Owner(row["uid"], row["name"]), f"projects/{row['name']}"


class ProjectServicer:
    """argosy.admin.v1.ProjectService."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def CreateProject(self, request: pb.CreateProjectRequest, context: Any) -> pb.Project:
        """Make a project with an unlimited policy."""
        bounds.check(request)

        async def work(connection: AsyncConnection) -> tuple[pb.Project, Owner, str]:
            if await records.project(connection, request.project_id) is not None:
                raise ResourceExists("project_id")
            asked = request.project
            row = await records.add_project(connection, request.project_id, asked.display_name, asked.labels)
            return shown(row), *_about(row)

        return await self._desk.change("CreateProject", request, pb.Project, work)

    async def GetProject(self, request: pb.GetProjectRequest, context: Any) -> pb.Project:
        """One project: the caller's own, or any with scope `platform`."""
        bounds.check(request)
        async with self._desk.store.transaction() as connection:
            return shown(await _found(connection, request.name, lock=False))

    async def ListProjects(self, request: pb.ListProjectsRequest, context: Any) -> pb.ListProjectsResponse:
        """All projects."""
        bounds.check(request)
        conditions = lists.conditions(request.filter, STATES)
        order = lists.order(request.order_by, ORDERS, "name")
        listing = self._desk.listing(request.page_size, request.page_token, "projects", request.filter, request.order_by)
        async with self._desk.store.transaction() as connection:
            rows = await records.list_projects(connection, conditions, order, listing.after, listing.limit)
        projects, token = self._desk.page(listing, rows, shown, lambda row: records.after_of(row, order[0]))
        return pb.ListProjectsResponse(projects=projects, next_page_token=token)

    async def UpdateProject(self, request: pb.UpdateProjectRequest, context: Any) -> pb.Project:
        """Change display name and labels."""
        bounds.check(request)
        changed = paths(request.project, request.update_mask, MUTABLE)

        async def work(connection: AsyncConnection) -> tuple[pb.Project, Owner, str]:
            row = await _found(connection, request.project.name, "project.name")
            lists.check_etag(request.project.etag, row["uid"], row["revision"], "project.etag")
            values: dict[str, Any] = {"display_name": request.project.display_name, "labels": dict(request.project.labels)}
            row = await records.change_project(connection, row["uid"], **{name: values[name] for name in changed})
            return shown(row), *_about(row)

        return await self._desk.change("UpdateProject", request, pb.Project, work)

    async def DeleteProject(self, request: pb.DeleteProjectRequest, context: Any) -> deletion_pb2.Deletion:
        """Put a project out of reach. Its books stay: what was used was used. It owns nothing else yet, so the erasure is done at once."""
        bounds.check(request)

        async def work(connection: AsyncConnection) -> tuple[deletion_pb2.Deletion, Owner, str]:
            row = await _found(connection, request.name)
            lists.check_etag(request.etag, row["uid"], row["revision"])
            _not_own(row)
            await records.delete_project(connection, row["uid"])
            uid, now = str(uuid4()), timestamp(datetime.now(UTC))
            deletion = deletion_pb2.Deletion(
                name=f"projects/{row['name']}/deletions/{uid}",
                uid=uid,
                state=deletion_pb2.Deletion.STATE_DONE,
                create_time=now,
                end_time=now,
                target=request.name,
            )
            return deletion, *_about(row)

        return await self._desk.change("DeleteProject", request, deletion_pb2.Deletion, work)

    async def SuspendProject(self, request: pb.SuspendProjectRequest, context: Any) -> pb.Project:
        """Refuse every key of the project; safe to repeat."""
        return await self._move("SuspendProject", request, "SUSPENDED")

    async def RestoreProject(self, request: pb.RestoreProjectRequest, context: Any) -> pb.Project:
        """End a suspension; safe to repeat."""
        return await self._move("RestoreProject", request, "ACTIVE")

    async def _move(self, method: str, request: Any, state: str) -> pb.Project:
        bounds.check(request)

        async def work(connection: AsyncConnection) -> tuple[pb.Project, Owner, str]:
            row = await _found(connection, request.name)
            lists.check_etag(request.etag, row["uid"], row["revision"])
            if state == "SUSPENDED":
                _not_own(row)
            if row["state"] != state:
                row = await records.change_project(connection, row["uid"], state=state)
            return shown(row), *_about(row)

        return await self._desk.change(method, request, pb.Project, work)


def _not_own(row: Row) -> None:
    """The caller's own project stays: no key would be left to bring it back."""
    if row["uid"] == caller().project_uid:
        raise WrongState("name", "own_project")
