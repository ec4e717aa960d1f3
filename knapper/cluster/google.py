"""Checks a deployment's buckets, subscription and quotas on Google Cloud, with the caller's rights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from knapper.cluster.findings import Finding
from knapper.cluster.kustomize import Object

_TIMEOUT_S = 20.0
# GKE's names of GPUs, and the quotas of Compute Engine that they count against (PREEMPTIBLE_... for Spot).
QUOTAS = {
    "nvidia-l4": "NVIDIA_L4_GPUS", "nvidia-tesla-t4": "NVIDIA_T4_GPUS", "nvidia-tesla-a100": "NVIDIA_A100_GPUS",
    "nvidia-a100-80gb": "NVIDIA_A100_80GB_GPUS", "nvidia-h100-80gb": "NVIDIA_H100_GPUS",
}  # fmt: skip


@dataclass(frozen=True)
class Google:
    """`token` gives a bearer token; the addresses are arguments so that another server can stand for Google's."""

    token: Callable[[], str]
    project: str = ""
    region: str = ""
    accelerator: str = ""
    subscription: str = ""  # projects/PROJECT/subscriptions/NAME
    spot: bool = True
    storage: str = "https://storage.googleapis.com/storage/v1"
    pubsub: str = "https://pubsub.googleapis.com/v1"
    compute: str = "https://compute.googleapis.com/compute/v1"

    def examine(self, settings: Object) -> Iterator[Finding]:
        """`settings`: those of the services, from the ConfigMap."""
        if settings.get("STORAGE_EMULATOR_HOST"):
            yield Finding(
                "bucket", "unknown", f"an emulator: {settings['STORAGE_EMULATOR_HOST']}", "none needed for a trial"
            )
            return
        bucket = settings.get("KNAPPER_STORE", "").removeprefix("gs://").partition("/")[0]
        if not bucket:
            yield Finding(
                "KNAPPER_STORE",
                "wrong",
                settings.get("KNAPPER_STORE", "not set"),
                "set it to gs://BUCKET in the overlay",
            )
        else:
            yield from self._bucket(bucket)
        if self.subscription:
            yield from self._subscription()
        if self.project and self.region and self.accelerator:
            yield from self._quota()

    def _bucket(self, bucket: str) -> Iterator[Finding]:
        about = f"bucket {bucket}"
        found, trouble = self._get(f"{self.storage}/b/{bucket}")
        if found is None:
            yield Finding(
                about,
                "unknown",
                trouble,
                "gcloud auth application-default login, as a user with storage.buckets.get",
            )
            return
        update = f"gcloud storage buckets update gs://{bucket}"
        kept_s = int(found.get("softDeletePolicy", {}).get("retentionDurationSeconds", 0))
        yield _expect(
            f"{about} soft delete", kept_s == 0, f"{kept_s} s", f"{update} --clear-soft-delete",
        )  # fmt: skip
        deletes = [rule for rule in found.get("lifecycle", {}).get("rule", []) if rule["action"]["type"] == "Delete"]
        yield _expect(
            f"{about} lifecycle", not deletes, f"{len(deletes)} rules that delete",
            f"{update} --clear-lifecycle: they race the collector, which alone knows what may go",
        )  # fmt: skip
        versions = bool(found.get("versioning", {}).get("enabled"))
        yield _expect(
            f"{about} versioning", not versions, "on" if versions else "off", f"{update} --no-versioning",
        )  # fmt: skip
        if self.region:
            location = str(found.get("location", "")).lower()
            yield _expect(
                f"{about} location", location == self.region, location,
                f"make one in {self.region}, beside the GPUs: every operation waits for it",
            )  # fmt: skip

    def _subscription(self) -> Iterator[Finding]:
        about = f"subscription {self.subscription.rpartition('/')[2]}"
        found, trouble = self._get(f"{self.pubsub}/{self.subscription}")
        if found is None:
            yield Finding(about, "unknown", trouble, "terraform -chdir=terraform/stages/10-platform apply")
            return
        update = f"gcloud pubsub subscriptions update {self.subscription}"
        yield _expect(
            f"{about} state",
            found.get("state") == "ACTIVE",
            str(found.get("state")),
            f"{update} --expiration-period=never",
        )
        never = not found.get("expirationPolicy", {}).get("ttl")
        yield _expect(
            f"{about} expiration", never, "never" if never else found["expirationPolicy"]["ttl"],
            f"{update} --expiration-period=never",
        )  # fmt: skip
        dead = found.get("deadLetterPolicy", {}).get("deadLetterTopic", "")
        yield _expect(
            f"{about} dead letters",
            bool(dead),
            dead or "none",
            f"{update} --dead-letter-topic=TOPIC --max-delivery-attempts=100",
        )
        pull = not found.get("pushConfig", {}).get("pushEndpoint")
        yield _expect(f"{about} delivery", pull, "pull" if pull else "push", f"{update} --push-endpoint=")

    def _quota(self) -> Iterator[Finding]:
        metric = QUOTAS.get(self.accelerator)
        about = f"quota for {self.accelerator}"
        if metric is None:
            yield Finding(
                about,
                "unknown",
                "a GPU whose quota is not known here",
                f"gcloud compute regions describe {self.region}",
            )
            return
        metric = f"PREEMPTIBLE_{metric}" if self.spot else metric
        found, trouble = self._get(f"{self.compute}/projects/{self.project}/regions/{self.region}")
        quota = next((each for each in (found or {}).get("quotas", []) if each["metric"] == metric), None)
        if quota is None:
            yield Finding(
                about, "unknown", trouble or f"{metric} is not listed", f"gcloud compute regions describe {self.region}"
            )
            return
        free = float(quota["limit"]) - float(quota["usage"])
        yield _expect(
            about, free >= 2, f"{free:.0f} of {float(quota['limit']):.0f} free",  # train-step and sample
            f"ask for {metric} in {self.region}: https://console.cloud.google.com/iam-admin/quotas?project={self.project}",
        )  # fmt: skip

    def _get(self, url: str) -> tuple[Any, str]:
        try:
            answer = httpx.get(url, headers={"Authorization": f"Bearer {self.token()}"}, timeout=_TIMEOUT_S)
        except httpx.HTTPError as error:
            return None, f"{type(error).__name__}: {error}"
        return (answer.json(), "") if answer.is_success else (None, f"{answer.status_code} for {url}")


def _expect(about: str, good: bool, seen: str, remedy: str) -> Finding:
    return Finding(about, "good" if good else "wrong", seen, "" if good else remedy)


def default_token() -> str:
    """The current user's application default credentials."""
    import google.auth
    from google.auth.transport.requests import Request

    credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform.read-only"])
    credentials.refresh(Request())  # type: ignore[no-untyped-call]  # no types
    return str(credentials.token)
