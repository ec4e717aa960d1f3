"""The Kubernetes API, as much of it as an operator's commands need: objects read, applied, merged and deleted.

The `kubernetes` package brings what is hard, kubeconfigs and their many ways to prove who one is; paths and bodies are
ours, since there is no generated client for Knative's kinds.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes
import urllib3

from knapper.cluster.kustomize import Object, identity
from knapper.errors import InvalidField, Unavailable, UserError

_TIMEOUT_S = 30.0
_MANAGER = "knapper-deploy"
_PLURALS = {"NetworkPolicy": "networkpolicies"}  # the others take an s
_CLUSTER_WIDE = {"Namespace", "Node", "CustomResourceDefinition", "RuntimeClass", "KnativeVersion"}


class Api:
    """One cluster. Every method raises Unavailable when it does not answer, UserError when it refuses."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @staticmethod
    def open(kubeconfig: Path | None = None, context: str | None = None) -> "Api":
        """By a kubeconfig, as kubectl finds it. Raises InvalidField."""
        try:
            path = str(kubeconfig) if kubeconfig else None
            client = kubernetes.config.new_client_from_config(path, context)  # type: ignore[no-untyped-call]  # no types
        except (kubernetes.config.ConfigException, OSError) as error:
            shown = str(kubeconfig or "KUBECONFIG, or ~/.kube/config")
            raise InvalidField("kubeconfig", shown, "a file that kubectl can use", str(error)) from error
        return Api(client)

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Object | None:
        """What lies at a path of the API, None if nothing does."""
        return self._ask("GET", path, query=query)

    def list(self, api_version: str, kind: str, namespace: str = "", labels: str = "") -> list[Object]:
        """The objects of a kind; none if the cluster does not know it."""
        found = self.get(path(api_version, kind, namespace), {"labelSelector": labels} if labels else {})
        return [] if found is None else list(found["items"])

    def apply(self, thing: Object, *, dry_run: bool = False) -> Object:
        """Make the object what it says, server-side: repeats change nothing, and fields of others stay theirs."""
        query = {"fieldManager": _MANAGER, "force": "true"} | ({"dryRun": "All"} if dry_run else {})
        applied = self._ask("PATCH", path_of(thing), thing, "application/apply-patch+yaml", query)
        if applied is None:
            raise UserError(
                f"{thing['kind']} {thing['metadata']['name']}: the cluster knows no such kind or namespace; "
                "`knapper doctor` tells what is not installed"
            )
        return applied

    def merge(self, thing: Object) -> None:
        """Merge these fields into the object that is there; null removes a field."""
        if self._ask("PATCH", path_of(thing), thing, "application/merge-patch+json") is None:
            about = f"{thing['kind']} {thing['metadata']['name']}"
            raise UserError(f"{about} is not there; apply an overlay of knative/ first")

    def delete(self, thing: Object, *, at_once: bool = False) -> bool:
        """False if it was not there. `at_once`: a pod has no time to tidy up."""
        query = {"gracePeriodSeconds": "0"} if at_once else None
        return self._ask("DELETE", path_of(thing), query=query) is not None

    def review(self, verb: str, group: str, resource: str, namespace: str) -> bool:
        """Whether whoever we are may do this there."""
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {
                "resourceAttributes": {"verb": verb, "group": group, "resource": resource, "namespace": namespace}
            },
        }
        where = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = self._ask("POST", where, body, "application/json")
        return bool(answer and answer["status"]["allowed"])

    def text(self, path: str) -> str | None:
        """What a proxied service answers; None unless it is a success."""
        status, data = self._send("GET", path)
        return data.decode(errors="replace") if status == 200 else None

    def _ask(
        self, method: str, path: str, body: object = None, kind: str = "", query: Mapping[str, str] | None = None
    ) -> Object | None:  # fmt: skip
        status, data = self._send(method, path, body, kind, query)
        if status == 404:
            return None
        try:
            answer: Object = json.loads(data)
        except ValueError as error:
            raise Unavailable(
                f"{method} {path}: the cluster answered {status} with something that is no JSON"
            ) from error
        if status >= 500 or status == 429:
            raise Unavailable(f"{method} {path}: {status} {answer.get('message', '')}")
        if status >= 400:
            raise UserError(f"{method} {path}: {status} {answer.get('message', '')}")
        return answer

    def _send(
        self, method: str, path: str, body: object = None, kind: str = "", query: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:  # fmt: skip
        headers = {"Accept": "application/json"} | ({"Content-Type": kind} if kind else {})
        ready = self._client.param_serialize(
            method, path, query_params=list((query or {}).items()), header_params=headers, body=body,
            auth_settings=["BearerToken"],
        )  # fmt: skip
        try:
            answer = self._client.call_api(*ready, _request_timeout=_TIMEOUT_S)
            return answer.status, answer.read()
        except (urllib3.exceptions.HTTPError, kubernetes.client.ApiException) as error:
            raise Unavailable(f"the cluster does not answer: {error}") from error


def path(api_version: str, kind: str, namespace: str = "") -> str:
    """Where the objects of a kind are."""
    base = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
    inside = f"/namespaces/{namespace}" if namespace and kind not in _CLUSTER_WIDE else ""
    plural = _PLURALS.get(kind, kind.lower() + ("es" if kind.endswith("ss") else "s"))
    return f"{base}{inside}/{plural}"


def path_of(thing: Object) -> str:
    """Where the object is."""
    _, kind, namespace, name = identity(thing)
    return f"{path(thing['apiVersion'], kind, namespace)}/{name}"
