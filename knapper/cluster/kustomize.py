"""The part of kustomize that our manifests use, so that rendering needs no other program.

resources, components, patches (RFC 6902, with a target; or `$patch: delete` for a whole object), configMapGenerator
(literals, files, merge) and images.
Whatever else a kustomization says is refused: nothing is rendered in another way than `kubectl kustomize` renders it (a
test compares).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

from knapper.errors import InvalidField

Object = dict[str, Any]  # a Kubernetes object, as YAML gives it

_KNOWN = {
    "apiVersion", "kind", "resources", "components", "generatorOptions", "configMapGenerator", "images", "patches",
}  # fmt: skip


def render(directory: Path, *components: Path) -> list[Object]:
    """The objects of a kustomization, with these components over it. Raises InvalidField for what it cannot render."""
    objects = _build(directory, [])
    for component in components:
        objects = _build(component, objects)
    return objects


def identity(thing: Object) -> tuple[str, str, str, str]:
    """(group, kind, namespace, name): what an object is, whatever it says."""
    group = thing["apiVersion"].rpartition("/")[0]
    return group, thing["kind"], thing["metadata"].get("namespace", ""), thing["metadata"]["name"]


def documents(path: Path) -> list[Object]:
    """The objects of a YAML file."""
    try:
        return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]
    except (OSError, yaml.YAMLError) as error:
        raise InvalidField("manifest", str(path), "a YAML file", str(error)) from error


def _build(directory: Path, objects: list[Object]) -> list[Object]:
    path = directory / "kustomization.yaml"
    (plan,) = documents(path)
    if unknown := set(plan) - _KNOWN:
        raise InvalidField("kustomization", f"{path}: {', '.join(sorted(unknown))}", ", ".join(sorted(_KNOWN)))
    for name in plan.get("resources", []):
        place = directory / name
        objects += _build(place, []) if place.is_dir() else documents(place)
    for plan_of_map in plan.get(
        "configMapGenerator", []
    ):  # before components: what these generate cannot be merged into
        _generate(plan_of_map, directory, objects)
    for name in plan.get("components", []):
        objects = _build(directory / name, objects)
    for patch in plan.get("patches", []):
        said = yaml.safe_load(patch["patch"])
        chosen = [number for number, thing in enumerate(objects) if _matches(thing, patch["target"])]
        if not chosen:
            raise InvalidField("kustomization", f"{path}: target {patch['target']}", "an object that is there")
        if isinstance(said, dict):
            if said.get("$patch") != "delete":
                raise InvalidField("kustomization", f"{path}: a patch of fields", "RFC 6902, or $patch: delete")
            objects = [thing for number, thing in enumerate(objects) if number not in chosen]
            continue
        operations = jsonpatch.JsonPatch(said)
        for number in chosen:
            objects[number] = operations.apply(objects[number])
    for image in plan.get("images", []):
        for container in _containers(objects):
            _rename(container, image)
    return objects


def _generate(plan: Mapping[str, Any], directory: Path, objects: list[Object]) -> None:
    data = dict(line.split("=", 1) for line in plan.get("literals", []))
    data |= {Path(name).name: (directory / name).read_text(encoding="utf-8") for name in plan.get("files", [])}
    metadata = {"name": plan["name"], "namespace": plan["namespace"]}
    if plan.get("behavior") != "merge":
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
        return
    for thing in objects:
        if thing["kind"] == "ConfigMap" and thing["metadata"] == metadata:
            thing["data"] |= data
            return
    raise InvalidField("kustomization", f"{directory}: ConfigMap {plan['name']}", "one that is there to be merged into")


def _matches(thing: Object, target: Mapping[str, str]) -> bool:
    group, _, version = thing["apiVersion"].rpartition("/")
    said = {"group": group, "version": version, "kind": thing["kind"], "name": thing["metadata"]["name"]}
    return all(re.fullmatch(pattern, said[field]) for field, pattern in target.items())


def _containers(objects: list[Object]) -> Iterator[Object]:
    for thing in objects:
        spec = thing.get("spec", {})
        template = spec.get("template", {}) if isinstance(spec, dict) else {}
        pod = template.get("spec", {}) if isinstance(template, dict) else {}
        yield from (*pod.get("initContainers", []), *pod.get("containers", []))


def _rename(container: Object, image: Mapping[str, str]) -> None:
    if re.split(r"[:@]", container["image"])[0] != image["name"]:
        return
    kept = container["image"].removeprefix(image["name"])
    end = f"@{image['digest']}" if "digest" in image else f":{image['newTag']}" if "newTag" in image else kept
    container["image"] = image.get("newName", image["name"]) + end
