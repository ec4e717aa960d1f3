"""The part of the Kubernetes API that the operator's commands need: reads, applies, merges and deletes objects.

The `kubernetes` package brings what is hard: kubeconfigs and their many ways to prove who one is, and the paths
of kinds, which the cluster is asked for. Ours are a limit of time, and errors.
"""

import json
import os
from pathlib import Path
from typing import Any

import kubernetes
import urllib3
from kubernetes.dynamic import DynamicClient, Resource
from kubernetes.dynamic.exceptions import DynamicApiError, NotFoundError, ResourceNotFoundError

from knapper.cluster.kustomize import Object
from knapper.errors import InvalidField, Unavailable, UserError

_TIMEOUT_S = 30.0
_MANAGER = "knapper-deploy"
# A cache of kinds would lie in /tmp under a name that anybody can write first, and be old; this can be no file.
_NO_CACHE = Path(os.devnull, "none")


class Api:
    """One cluster. Every method raises Unavailable when it does not answer, UserError when it refuses."""

    def __init__(self, client: "_Client") -> None:
        self._client = client

    @staticmethod
    def open(kubeconfig: Path | None = None, context: str | None = None) -> "Api":
        """Open by a kubeconfig, which is found as kubectl does. Raises InvalidField, and as every method does."""
        try:
            path = str(kubeconfig) if kubeconfig else None
            client = kubernetes.config.new_client_from_config(path, context)  # type: ignore[no-untyped-call]  # no types
        except (kubernetes.config.ConfigException, OSError) as error:
            shown = str(kubeconfig or "KUBECONFIG, or ~/.kube/config")
            raise InvalidField("kubeconfig", shown, "a file that kubectl can use", str(error)) from error
        return Api(_Client(client, cache_file=str(_NO_CACHE)))  # type: ignore[no-untyped-call]  # no types

    def version(self) -> str:
        """The version of Kubernetes, such as v1.34.9."""
        return str(self._client.version["kubernetes"]["gitVersion"])

    def get(self, api_version: str, kind: str, name: str, namespace: str = "") -> Object | None:
        """The object; None if it is not there, or the cluster does not know its kind."""
        return self._ask("get", api_version, kind, name=name, namespace=namespace)

    def list(self, api_version: str, kind: str, namespace: str = "", labels: str = "") -> list[Object]:
        """The objects of a kind; none if the cluster does not know it."""
        found = self._ask("get", api_version, kind, namespace=namespace, label_selector=labels or None)
        return [] if found is None else list(found["items"])

    def apply(self, thing: Object) -> None:
        """Server-side apply: repeats change nothing, and fields of other managers are kept."""
        more = {"field_manager": _MANAGER, "force_conflicts": "true"}
        if self._ask_of("server_side_apply", thing, body=thing, **more) is None:
            raise UserError(
                f"{thing['kind']} {thing['metadata']['name']}: the cluster knows no such kind or namespace; "
                "`knapper doctor` tells what is not installed"
            )

    def merge(self, thing: Object) -> None:
        """Merge these fields into the object that is there; null removes a field."""
        if self._ask_of("patch", thing, body=thing, content_type="application/merge-patch+json") is None:
            about = f"{thing['kind']} {thing['metadata']['name']}"
            raise UserError(f"{about} is not there; apply an overlay of knative/ first")

    def delete(self, thing: Object, *, at_once: bool = False) -> bool:
        """False if it was not there. `at_once`: a pod has no time to tidy up."""
        return self._ask_of("delete", thing, grace_period_seconds=0 if at_once else None) is not None

    def review(self, verb: str, group: str, resource: str, namespace: str) -> bool:
        """Whether the current user may do this there."""
        about = {"verb": verb, "group": group, "resource": resource, "namespace": namespace}
        version, kind = "authorization.k8s.io/v1", "SelfSubjectAccessReview"
        body = {"apiVersion": version, "kind": kind, "spec": {"resourceAttributes": about}}
        answer = self._ask("create", version, kind, body=body)
        return bool(answer and answer["status"]["allowed"])

    def pod_text(self, pod: str, port: int, path: str, namespace: str) -> str | None:
        """What a pod answers to a GET, through the cluster; None unless it is a success."""
        where = f"/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy/{path}"
        client = self._client.client
        try:
            ready = client.param_serialize("GET", where, header_params={"Accept": "*/*"}, auth_settings=["BearerToken"])
            answer = client.call_api(*ready, _request_timeout=_TIMEOUT_S)
            return str(answer.read().decode(errors="replace")) if answer.status == 200 else None
        except urllib3.exceptions.HTTPError as error:
            raise Unavailable(f"the cluster does not answer: {error}") from error

    def _ask_of(self, verb: str, thing: Object, **more: Any) -> Object | None:
        metadata = thing["metadata"]
        named = {"name": metadata["name"], "namespace": metadata.get("namespace")}
        return self._ask(verb, thing["apiVersion"], thing["kind"], **named, **more)

    def _ask(self, verb: str, api_version: str, kind: str, **more: Any) -> Object | None:
        group, _, version = api_version.rpartition("/")
        try:
            where = {"prefix": "apis" if group else "api", "group": group, "api_version": version, "kind": kind}
            resource: Resource = self._client.resources.get(**where)
            answer: Object = getattr(resource, verb)(serializer=_plain, **more)
            return answer
        except (NotFoundError, ResourceNotFoundError):
            return None


class _Client(DynamicClient):
    """Waits only so long, for what it discovers too, and raises our errors; NotFoundError stays, as it looks for it."""

    def request(self, method: str, path: str, body: object = None, **params: Any) -> Any:
        about = f"{method.upper()} {path}"
        try:
            answer = super().request(method, path, body, _request_timeout=_TIMEOUT_S, **params)
        except NotFoundError:
            raise
        except DynamicApiError as error:
            status = error.status
            kind = Unavailable if status is None or status >= 500 or status == 429 else UserError
            raise kind(f"{about}: {status} {_message(error.body)}") from error
        except urllib3.exceptions.HTTPError as error:
            raise Unavailable(f"the cluster does not answer: {error}") from error
        if isinstance(answer, str):  # the library returns text for anything but JSON
            raise Unavailable(f"{about}: the cluster's answer is no JSON")
        return answer


def _plain(_: DynamicClient, answer: Object) -> Object:
    return answer


def _message(body: str | bytes | None) -> str:
    try:
        return str(json.loads(body or "")["message"])
    except (ValueError, TypeError, KeyError):
        return "and no reason"
