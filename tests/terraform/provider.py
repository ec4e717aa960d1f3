"""Providers of Terraform's that have their schema and nothing else: enough to validate, and for tests that mock them.

`install` makes a folder of them, from which `terraform init` takes them in place of its registry. Google's schema is
its own (`tests.terraform.schema`); those of helm and local are what we use of them, by their documentation.
"""

from __future__ import annotations  # grpc's classes are generic for the type checker alone

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from tests.terraform import schema
from tests.terraform.schema import Arguments

_ROOT = Path(__file__).parent.parent.parent
_LIST = 2  # how blocks are nested, in Terraform's protocol
_TEXT: Arguments = {"required": False, "kind": "string"}
_PROVIDERS: dict[str, Arguments] = {
    "google": {"project": _TEXT, "region": _TEXT},
    "google-beta": {"project": _TEXT, "region": _TEXT},
    "helm": {"kubernetes": {"required": False, "kind": "object", "of": {"host": "string", "token": "string"}}},
    "local": {},
}
_OTHERS: dict[str, dict[str, Arguments]] = {
    "helm": {
        "helm_release": {
            **dict.fromkeys(("namespace", "repository", "version"), _TEXT),
            **{name: {"required": True, "kind": "string"} for name in ("name", "chart")},
            **{name: {"required": False, "kind": "bool"} for name in ("create_namespace", "wait")},
            "timeout": {"required": False, "kind": "number"},
            "values": {"required": False, "kind": "list"},
        }
    },
    "local": {"local_file": {"filename": {"required": True, "kind": "string"}, "content": _TEXT}},
}
_OTHERS_COMPUTE: dict[str, dict[str, Any]] = {
    "helm": {"id": "string", "metadata": ["object", {"revision": "number"}]},
    "local": {"id": "string"},
}


def install(folder: Path, google: str) -> dict[str, str]:
    """Make them, Google's of this version; return the environment in which terraform uses them."""
    versions = {"google": google, "google-beta": google, "helm": "3.0.0", "local": "2.5.0"}
    for name, version in versions.items():
        place = folder / "registry.terraform.io" / "hashicorp" / name / version / "linux_amd64"
        place.mkdir(parents=True)
        program = place / f"terraform-provider-{name}_v{version}"
        program.write_text(
            f"#!/bin/sh\nPYTHONPATH={_ROOT} exec {sys.executable} -m tests.terraform.provider {name} {version}\n"
        )
        program.chmod(0o755)
    settings = folder / "terraformrc"
    settings.write_text(f'provider_installation {{\n  filesystem_mirror {{ path = "{folder}" }}\n}}\n')
    return {"TF_CLI_CONFIG_FILE": str(settings), "TF_DISABLE_PLUGIN_TLS": "1", "CHECKPOINT_DISABLE": "1"}


# -- its schema, in Terraform's protocol 6 -----------------------------------------------------------------------------


def _varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + _varint(n // 128)


def _field(number: int, value: bytes | str | int) -> bytes:
    """Of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _attribute(name: str, type_: Any, *, required: bool = False, computed: bool = False) -> bytes:
    mode = _field(4, 1) if required else _field(6, 1) if computed else _field(5, 1)
    if name == "id":
        mode = _field(5, 1) + _field(6, 1)
    return _field(2, _field(1, name) + _field(2, json.dumps(type_)) + mode)


def _block(arguments: Arguments, computed: dict[str, Any]) -> bytes:
    types = {"list": ["list", "string"], "map": ["map", "string"]}
    parts = [_attribute(name, type_, computed=True) for name, type_ in computed.items()]
    for name, about in arguments.items():
        if about["kind"] == "block":
            parts.append(_field(3, _field(1, name) + _field(2, _block(about["block"], {})) + _field(3, _LIST)))
        else:
            type_ = ["object", about["of"]] if about["kind"] == "object" else types.get(about["kind"], about["kind"])
            parts.append(_attribute(name, type_, required=about["required"]))
    return b"".join(parts)


def described(name: str, version: str) -> bytes:
    """The answer to GetProviderSchema."""
    answer = _field(1, _field(2, _block(_PROVIDERS[name], {})))
    google = name.startswith("google")
    kinds = schema.known(version) if google else _OTHERS[name]
    for kind, arguments in kinds.items():
        computed = schema.computed(version)[kind] if google else _OTHERS_COMPUTE[name]
        about = _field(2, _block(arguments, computed))
        answer += _field(3 if kind.startswith("data.") else 2, _field(1, kind.removeprefix("data.")) + _field(2, about))
    return answer


class _Answers(grpc.GenericRpcHandler):
    """To all else that may be asked: nothing to say."""

    def __init__(self, description: bytes, ended: threading.Event) -> None:
        self._description, self._ended = description, ended

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if not details.method.startswith(("/tfplugin6.Provider/", "/plugin.GRPCController/")):
            return None
        if details.method.endswith("/Shutdown"):
            self._ended.set()
        said = self._description if details.method.endswith("/GetProviderSchema") else b""
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: said)


def main(name: str, version: str) -> None:
    ended = threading.Event()
    server = grpc.server(ThreadPoolExecutor(4), handlers=[_Answers(described(name, version), ended)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"1|6|tcp|127.0.0.1:{port}|grpc", flush=True)
    while not ended.wait(1.0) and os.getppid() != 1:
        pass
    server.stop(1.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
