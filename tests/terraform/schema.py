"""What Google's Terraform provider takes, as its own published schema says, for the types that we use.

The provider cannot be had without Terraform's registry; the Python package cdktf-cdktf-provider-google carries the
schema of the provider 6.50 that it was made of. `python -m tests.terraform.schema WHEEL` reads it, and writes
`schema.json` anew.
"""

import io
import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from tests.terraform.reading import TERRAFORM, blocks, documents

WHEEL = "cdktf-cdktf-provider-google==16.12.1"
FILE = Path(__file__).with_name("schema.json")
OLDEST, NEWEST = "7.22", "9"  # of the provider: sandbox_config.type came with 7.22
Arguments = dict[
    str, Any
]  # name -> {"required": bool, "kind": string | number | bool | list | map | block, "block": Arguments}

# Newer than the package, which froze in December 2025; each as the documentation of hashicorp/google 7.45.0 has it, on
# the page of the resource (website/docs/r/container_node_pool.html.markdown).
NEWER: dict[str, Arguments] = {
    "google_container_node_pool": {
        "node_config.sandbox_config": {
            "required": False,
            "kind": "block",
            "block": {"type": {"required": True, "kind": "string"}},
        }
    }
}

# Of google-beta alone (website/docs/r/project_service_identity.html.markdown).
BETA: dict[str, Arguments] = {
    "google_project_service_identity": {
        "project": {"required": False, "kind": "string"},
        "service": {"required": True, "kind": "string"},
    }
}

# Of the types that we use: in the provider's code of 7.45.0, and in the notes of the release 8.9.0 (the last one).
DEPRECATED: dict[str, tuple[str, ...]] = {
    "google_certificate_manager_certificate": (
        "self_managed.certificate_pem", "self_managed.private_key_pem",
    ),
    "google_compute_network": ("numeric_id",),
    "google_container_cluster": (
        "binary_authorization.enabled", "enterprise_config", "addons_config.parallelstore_csi_driver_config",
        "remove_default_node_pool",
    ),
}  # fmt: skip


def used() -> set[str]:
    """Types of Google's that any of our files names: resources, and data.* for data sources."""
    found = set()
    for document in documents().values():
        found |= {kind for kind, _, _ in blocks(document, "resource") if kind.startswith("google_")}
        found |= {f"data.{kind}" for kind, _, _ in blocks(document, "data") if kind.startswith("google_")}
    return found


def extract(wheel: Path) -> dict[str, Arguments]:
    """The arguments of every type that is used."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".jsii.tgz")]
        packed = io.BytesIO(archive.read(name))
    with tarfile.open(fileobj=packed) as tar:
        file = tar.extractfile("package/.jsii")
        assert file
        types = json.load(file)["types"]
    configs = {fqn: about for fqn, about in types.items() if about["kind"] == "interface" and fqn.endswith("Config")}
    found = {}
    for kind in sorted(used() - set(BETA)):
        camel = "".join(part.title() for part in kind.removeprefix("data.").split("_")[1:])
        wanted = f"Data{'Google' + camel}" if kind.startswith("data.") else camel
        (fqn,) = [
            each for each in configs if each.rpartition(".")[2] == f"{wanted}Config" and _is_resource(types, each)
        ]
        found[kind] = _arguments(types, fqn, skip=frozenset({"id"}))  # which the schema has for all
    return found


def _is_resource(types: Arguments, fqn: str) -> bool:
    return "cdktf.TerraformMetaArguments" in types[fqn].get("interfaces", [])


def _arguments(types: Arguments, fqn: str, skip: frozenset[str] = frozenset()) -> Arguments:
    found = {}
    for about in types[fqn].get("properties", []):
        docs = about.get("docs", {})
        anchor = re.search(r"#(\w+) \w+#\w+\}", docs.get("remarks", "") + docs.get("summary", ""))
        if anchor and about["name"] not in skip:
            kind, block = _kind(types, about["type"])
            required = not about.get("optional", False)
            found[anchor[1]] = {"required": required, "kind": kind} | ({"block": block} if block is not None else {})
    return found


def _kind(types: Arguments, type_: Any) -> tuple[str, Arguments | None]:
    if "primitive" in type_:
        return {"boolean": "bool"}.get(type_["primitive"], type_["primitive"]), None
    if "collection" in type_:
        collection = type_["collection"]
        kind, block = _kind(types, collection["elementtype"])
        return ("map", None) if collection["kind"] == "map" else ("block", block) if kind == "block" else ("list", None)
    if "union" in type_:
        kinds = [_kind(types, each) for each in type_["union"]["types"] if each.get("fqn") != "cdktf.IResolvable"]
        return next((each for each in kinds if each[0] == "block"), kinds[0])
    if type_["fqn"] == "cdktf.IResolvable":
        return "bool", None
    return "block", _arguments(types, type_["fqn"])


def known() -> dict[str, Arguments]:
    """schema.json, with what is newer."""
    found: dict[str, Arguments] = json.loads(FILE.read_text(encoding="utf-8")) | BETA
    for kind, paths in NEWER.items():
        for path, about in paths.items():
            place, name = _place(found[kind], path)
            place[name] = about
    return found


def _place(arguments: Arguments, path: str) -> tuple[Arguments, str]:
    *outer, name = path.split(".")
    for each in outer:
        arguments = arguments[each]["block"]
    return arguments, name


if __name__ == "__main__":
    FILE.write_text(json.dumps(extract(Path(sys.argv[1])), sort_keys=True, separators=(",", ":")) + "\n")
    print(f"{FILE.relative_to(TERRAFORM.parent)}: {FILE.stat().st_size} bytes")
