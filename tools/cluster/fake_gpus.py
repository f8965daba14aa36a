"""A device plugin without devices: the kubelet counts, allocates and reports fake GPUs as if they were real.

`python -m tools.cluster.fake_gpus COUNT [FOLDER]`. SIGUSR1 turns the first GPU unhealthy, SIGUSR2 turns it healthy again.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

RESOURCE = "nvidia.com/gpu"
SOCKET = "argosy-fake-gpu.sock"
PLUGINS = Path("/var/lib/kubelet/device-plugins")
API = "v1beta1"
RETRY_SECONDS = 1.0
LISTEN_SECONDS = 30.0  # bounds how long a kubelet that is gone holds a thread
# The part of the kubelet's device-plugin API that we speak. Message: fields in the order of their numbers, "*" repeated, ":" a message.
SCHEMA: dict[str, list[tuple[str, str]]] = {
    "Empty": [],
    "RegisterRequest": [("version", ""), ("endpoint", ""), ("resource_name", "")],
    "DevicePluginOptions": [],
    "Device": [("ID", ""), ("health", "")],
    "ListAndWatchResponse": [("devices", "*:Device")],
    "ContainerAllocateRequest": [("devices_ids", "*")],
    "AllocateRequest": [("container_requests", "*:ContainerAllocateRequest")],
    "Variable": [("key", ""), ("value", "")],  # an entry of the map `envs`, which on the wire is a repeated message
    "ContainerAllocateResponse": [("envs", "*:Variable")],
    "AllocateResponse": [("container_responses", "*:ContainerAllocateResponse")],
}


def _messages() -> dict[str, Any]:
    """Classes made from the table: a generated module would be the only stub in tools."""
    file = descriptor_pb2.FileDescriptorProto(name="device_plugin.proto", package=API, syntax="proto3")
    field_type = descriptor_pb2.FieldDescriptorProto
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, 1):
            repeated, _, of = kind.partition(":")
            label = field_type.LABEL_REPEATED if repeated == "*" else field_type.LABEL_OPTIONAL
            if of:
                message.field.add(name=field, number=number, label=label, type=field_type.TYPE_MESSAGE, type_name=f".{API}.{of}")
            else:
                message.field.add(name=field, number=number, label=label, type=field_type.TYPE_STRING)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{API}.{name}")) for name in SCHEMA}


PB = _messages()


class FakeGpus:
    """The devices and the three calls about them."""

    def __init__(self, count: int) -> None:
        self._health = {f"GPU-{number}": "Healthy" for number in range(count)}
        self._changed = threading.Condition()

    def turn(self, health: str) -> None:
        """Say something else of the first GPU."""
        with self._changed:
            self._health["GPU-0"] = health
            self._changed.notify_all()

    def service(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """The service as a kubelet calls it."""
        handlers = {
            "GetDevicePluginOptions": _unary(lambda _: PB["DevicePluginOptions"](), "Empty"),
            "ListAndWatch": grpc.unary_stream_rpc_method_handler(self._watch, PB["Empty"].FromString, lambda m: m.SerializeToString()),
            "Allocate": _unary(self._allocate, "AllocateRequest"),
        }
        return grpc.method_handlers_generic_handler(f"{API}.DevicePlugin", handlers)

    def _watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        while context.is_active():
            with self._changed:
                yield PB["ListAndWatchResponse"](devices=[PB["Device"](ID=name, health=health) for name, health in self._health.items()])
                self._changed.wait(LISTEN_SECONDS)

    def _allocate(self, request: Any) -> Any:
        given = [{"key": "NVIDIA_VISIBLE_DEVICES", "value": ",".join(wanted.devices_ids)} for wanted in request.container_requests]
        return PB["AllocateResponse"](container_responses=[PB["ContainerAllocateResponse"](envs=[one]) for one in given])


def _unary(answer: Any, request: str) -> "grpc.RpcMethodHandler[Any, Any]":
    return grpc.unary_unary_rpc_method_handler(
        lambda asked, _: answer(asked), PB[request].FromString, lambda reply: reply.SerializeToString()
    )


def serve_until_kubelet_restarts(gpus: FakeGpus, folder: Path) -> None:
    """A starting kubelet empties the folder, so a new kubelet.sock means: bind and register again."""
    kubelet, own = folder / "kubelet.sock", folder / SOCKET
    known = kubelet.stat().st_ino
    own.unlink(missing_ok=True)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((gpus.service(),))
    server.add_insecure_port(f"unix://{own}")
    server.start()
    try:
        with grpc.insecure_channel(f"unix://{kubelet}") as channel:
            register = channel.unary_unary(f"/{API}.Registration/Register", lambda m: m.SerializeToString(), PB["Empty"].FromString)
            register(PB["RegisterRequest"](version=API, endpoint=SOCKET, resource_name=RESOURCE), timeout=10)
        print("registered", flush=True)
        while kubelet.exists() and kubelet.stat().st_ino == known and own.exists():
            time.sleep(RETRY_SECONDS)
    finally:
        server.stop(grace=None).wait()


def main() -> None:
    """Serve for ever."""
    gpus = FakeGpus(int(sys.argv[1]))
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else PLUGINS
    for number, health in ((signal.SIGUSR1, "Unhealthy"), (signal.SIGUSR2, "Healthy")):
        # On a thread of its own: a handler runs on the main thread and must not wait for a lock.
        signal.signal(number, lambda *_, health=health: threading.Thread(target=gpus.turn, args=(health,)).start())
    while True:
        try:
            serve_until_kubelet_restarts(gpus, folder)
        except (grpc.RpcError, OSError) as error:
            print("no kubelet yet:", type(error).__name__, flush=True)
        time.sleep(RETRY_SECONDS)


if __name__ == "__main__":
    main()
