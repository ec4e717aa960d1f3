"""The protobuf message classes, from a compiled descriptor in a private pool.

The SDK registers the same names in protobuf's default pool; with a private one, both can be in one process.
"""

from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_compiled = descriptor_pb2.FileDescriptorSet.FromString(
    files("knapper.wire").joinpath("tinker_public.binpb").read_bytes()
)  # fmt: skip
_pool = descriptor_pool.DescriptorPool()
for _file in _compiled.file:
    _pool.Add(_file)


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"tinker_public.{name}"))


ForwardBackwardRequest = _message("ForwardBackwardRequest")
ForwardBackwardOutput = _message("ForwardBackwardOutput")
SampleResponse = _message("SampleResponse")
UNSPECIFIED, FLOAT32, INT64, INT32, BFLOAT16 = range(5)  # DType
STOP, LENGTH = range(2)  # StopReason
