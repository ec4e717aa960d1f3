"""Write what scanners of Kubernetes objects understand: `python -m tests.manifests.scan DIRECTORY`.

They know Pods and Deployments, not Knative Services: each Service's pod is written as the Pod that Knative will make.
"""

import sys
from pathlib import Path

import yaml

from tests.manifests import schema
from tests.manifests.rendering import OVERLAYS, rendered, services


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in OVERLAYS:
        objects = rendered(name)
        pods = [schema.pod_of(service) for service in services(objects)]
        text = yaml.safe_dump_all([*objects, *pods], sort_keys=False)
        (directory / f"{Path(name).name}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
