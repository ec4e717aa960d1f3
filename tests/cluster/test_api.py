"""What is asked of a cluster goes to where it says that its kinds are, and no answer is taken for none."""

import socket
import tempfile
from pathlib import Path

import pytest
import yaml

from knapper.cluster import api
from knapper.cluster.api import Api
from knapper.errors import Unavailable, UserError
from tests.cluster.apiserver import Cluster, crd, serving

KNATIVE = "/apis/serving.knative.dev/v1"
POLICY = {"apiVersion": "example.org/v1alpha2", "kind": "Policy", "metadata": {"name": "one"}}


def test_the_cluster_says_where_a_kind_is_and_whether_in_a_namespace(tmp_path: Path) -> None:
    cluster = Cluster()
    cluster.put(crd("oxen.example.org", "Policy", "Cluster", "v1alpha2"), POLICY)
    with serving(cluster, tmp_path) as kubeconfig:
        ours = Api.open(kubeconfig)
        assert ours.get("example.org/v1alpha2", "Policy", "one") == POLICY
        assert ours.get("example.org/v1alpha2", "Policy", "two") is None
        assert ours.list("example.org/v1alpha2", "Policy", "any") == [POLICY]
        assert ours.delete(POLICY)
        assert not ours.delete(POLICY)
    assert ("DELETE", "/apis/example.org/v1alpha2/oxen/one", {}) in cluster.asked


@pytest.mark.parametrize(("version", "kind"), [("example.org/v1", "Policy"), ("apps/v1", "Policy"), ("v2", "Pod")])
def test_there_is_nothing_of_a_kind_that_is_not_known(version: str, kind: str, tmp_path: Path) -> None:
    thing = {"apiVersion": version, "kind": kind, "metadata": {"name": "one", "namespace": "here"}}
    with serving(Cluster(), tmp_path) as kubeconfig:
        ours = Api.open(kubeconfig)
        assert ours.list(version, kind) == []
        assert ours.get(version, kind, "one", "here") is None
        assert not ours.delete(thing)
        with pytest.raises(UserError, match="knows no such kind or namespace"):
            ours.apply(thing)


def test_a_kind_that_is_installed_meanwhile_is_found(tmp_path: Path) -> None:
    cluster = Cluster()
    with serving(cluster, tmp_path) as kubeconfig:
        ours = Api.open(kubeconfig)
        assert ours.list("example.org/v1alpha2", "Policy") == []
        cluster.put(crd("oxen.example.org", "Policy", "Cluster", "v1alpha2"), POLICY)
        assert ours.list("example.org/v1alpha2", "Policy") == [POLICY]


@pytest.mark.parametrize("path", [KNATIVE, f"{KNATIVE}/namespaces/knapper/services"])
def test_what_does_not_answer_now_is_not_taken_for_missing(path: str, cluster: Cluster, tmp_path: Path) -> None:
    """The library takes a group that is not answered for one without kinds."""
    cluster.broken.add(path)
    with serving(cluster, tmp_path) as kubeconfig, pytest.raises(Unavailable, match=f"GET /?{path[1:]}: 503"):
        Api.open(kubeconfig).list("serving.knative.dev/v1", "Service", "knapper")


@pytest.mark.parametrize("path", ["/apis", KNATIVE, f"{KNATIVE}/namespaces/knapper/services"])
def test_an_answer_that_is_no_json_is_no_answer(path: str, cluster: Cluster, tmp_path: Path) -> None:
    cluster.texts[path] = "<html>Sign in</html>"
    with serving(cluster, tmp_path) as kubeconfig, pytest.raises(Unavailable, match="no JSON"):
        Api.open(kubeconfig).list("serving.knative.dev/v1", "Service", "knapper")


def test_a_cluster_that_is_silent_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_TIMEOUT_S", 0.1)
    with serving(Cluster(), tmp_path) as kubeconfig, socket.create_server(("127.0.0.1", 0)) as silent:
        config = yaml.safe_load(kubeconfig.read_text())
        config["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        kubeconfig.write_text(yaml.safe_dump(config))
        with pytest.raises(Unavailable, match="does not answer"):
            Api.open(kubeconfig)


def test_nothing_that_a_cluster_said_is_read_from_a_file(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under /tmp, and by a name that is known, it could be anybody's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with serving(cluster, tmp_path) as kubeconfig:
        assert Api.open(kubeconfig).list("serving.knative.dev/v1", "Service", "knapper")
    assert list((tmp_path / "temporary").iterdir()) == []
