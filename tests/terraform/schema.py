"""What Google's Terraform provider takes, as its own published schema says, for the types that we use.

The provider cannot be had without Terraform's registry; the Python package cdktn-provider-google carries the schema of
the provider that it was made of. `python -m tests.terraform.schema WHEEL...` reads it, and writes schemas/ anew.
"""

import io
import json
import re
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.terraform.reading import blocks, documents

# The provider's version -> the package of it: the oldest and the newest that there is within our range.
PACKAGES = {"7.31.0": "cdktn-provider-google==19.0.0", "8.7.0": "cdktn-provider-google==21.1.0"}
OLDEST, NEWEST = "7.22", "9"  # of the provider: sandbox_config.type came with 7.22
_SCHEMAS = Path(__file__).with_name("schemas")
Arguments = dict[
    str, Any
]  # name -> {"required": bool, "kind": string | number | bool | list | map | block, "block": Arguments}

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


def extract(wheel: Path) -> tuple[str, dict[str, Any]]:
    """The provider's version; the arguments of every type that is used, and what it computes."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".jsii.tgz")]
        packed = io.BytesIO(archive.read(name))
    with tarfile.open(fileobj=packed) as tar:
        file = tar.extractfile("package/.jsii")
        assert file
        package = json.load(file)
    types, readme = package["types"], package["readme"]["markdown"]
    (version,) = re.findall(r"bindings for hashicorp/google provider version (\S+)", readme)
    arguments, computed = {}, {}
    for kind in sorted(used() - set(BETA)):
        camel = "".join(part.title() for part in kind.removeprefix("data.").split("_")[1:])
        wanted = f"Data{'Google' + camel}" if kind.startswith("data.") else camel
        (fqn,) = [each for each in types if each.rpartition(".")[2] == wanted and "base" in types[each]]
        arguments[kind] = _arguments(types, f"{fqn}Config", skip=frozenset({"id"}))  # which the schema has for all
        computed[kind] = _computed(types, fqn, arguments[kind])
    return version, {"arguments": arguments, "computed": computed}


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
        kinds = [_kind(types, each) for each in type_["union"]["types"] if each.get("fqn") != "cdktn.IResolvable"]
        return next((each for each in kinds if each[0] == "block"), kinds[0])
    if type_["fqn"] == "cdktn.IResolvable":
        return "bool", None
    return "block", _arguments(types, type_["fqn"])


def _computed(types: Arguments, fqn: str, arguments: Arguments) -> dict[str, Any]:
    """What a resource, or an object in it, has besides its arguments, with Terraform's types."""
    found = {}
    for about in types[fqn].get("properties", []):
        name = re.sub("([A-Z])", lambda letter: f"_{letter[0].lower()}", about["name"])
        if name not in ("tf_resource_type", "fqn", "internal_value", *arguments) and not name.endswith("_input"):
            found[name] = _cty(types, about["type"])
    return found


def _cty(types: Arguments, type_: Any) -> Any:
    """Terraform's name of the type."""
    if "primitive" in type_:
        return {"boolean": "bool"}.get(type_["primitive"], type_["primitive"])
    if "collection" in type_:
        return [
            {"array": "list"}.get(type_["collection"]["kind"], "map"),
            _cty(types, type_["collection"]["elementtype"]),
        ]
    name = type_.get("fqn", "cdktn.IResolvable")
    if name in types and name.endswith("List"):
        return ["list", ["object", _computed(types, f"{name.removesuffix('List')}OutputReference", {})]]
    if name in types and name.endswith("OutputReference"):
        return ["object", _computed(types, name, {})]
    return {"cdktn.IResolvable": "bool", "cdktn.StringMap": ["map", "string"]}.get(name, "dynamic")


@cache
def _stored(version: str) -> dict[str, dict[str, Arguments]]:
    found: dict[str, dict[str, Arguments]] = json.loads((_SCHEMAS / f"{version}.json").read_text(encoding="utf-8"))
    return found


def known(version: str) -> dict[str, Arguments]:
    """The arguments of each type, by that version of the provider."""
    return _stored(version)["arguments"] | BETA


def computed(version: str) -> dict[str, dict[str, Any]]:
    """What each type computes, with Terraform's types."""
    beta = {"id": "string", "email": "string", "member": "string"}
    return _stored(version)["computed"] | dict.fromkeys(BETA, beta)


if __name__ == "__main__":
    _SCHEMAS.mkdir(exist_ok=True)
    for path in map(Path, sys.argv[1:]):
        version, schema = extract(path)
        written = _SCHEMAS / f"{version}.json"
        written.write_text(json.dumps(schema, sort_keys=True, separators=(",", ":")) + "\n")
        print(f"{written.name}: {written.stat().st_size} bytes")
