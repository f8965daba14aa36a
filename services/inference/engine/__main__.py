"""The engine's process: `python -m services.inference.engine SETTINGS FD PARENT BUILD`, spawned by `ProcessHost` and by nothing else.

SETTINGS is JSON, FD the inherited end of a socket pair, PARENT the process id to die with, BUILD the `module:function` that loads the
model. Frames go over the socket, logs as JSON lines to stderr; neither prompts nor tokens are ever logged.
"""

import gc
import importlib
import logging
import os
import socket
import sys
import threading

import msgspec

from services.inference.engine.child import at, die_with, ignore_signals, log_as_json
from services.inference.engine.engine import Engine, offered, run
from services.inference.engine.fetching import Fetcher
from services.inference.engine.frames import FrameError, encode, to_engine
from services.inference.engine.inbox import Inbox
from services.inference.engine.settings import EngineSettings
from services.inference.engine.weighing import Weigher

READ_BYTES = 2**18

log = logging.getLogger("services.inference.engine")


def listen(connection: socket.socket, inbox: Inbox) -> None:
    """Feed the inbox until the parent hangs up, then end the process: there is nobody to finish a step for."""
    reader, status = to_engine(), 1
    try:
        while data := _receive(connection):
            inbox.put(reader.feed(data))
        status = 0
    except FrameError as failure:
        log.critical("the parent sent what is not a frame", extra=at(failure))
    finally:
        os._exit(status)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(READ_BYTES)
    except ConnectionError:
        return b""


def main(settings_json: str, fd: str, parent: str, build: str) -> int:
    """Load, say hello, step. Returns the exit status: 0 after a drain."""
    die_with(int(parent))
    ignore_signals()
    log_as_json()
    connection = socket.socket(fileno=int(fd))
    inbox = Inbox()
    threading.Thread(target=listen, args=(connection, inbox), name="inbox", daemon=True).start()
    try:
        settings = msgspec.json.decode(settings_json.encode(), type=EngineSettings)
        module, _, function = build.partition(":")
        runner, hello = getattr(importlib.import_module(module), function)(settings)
    except Exception as failure:  # before the first call there is no content to leak, and an operator needs the sentence
        log.critical("the model was not loaded: %s", failure, extra=at(failure))
        return 1
    # What is loaded stays: the collector need not walk it again and again between steps.
    gc.collect()
    gc.freeze()
    engine = Engine(runner, hello, settings, fetch=Fetcher(runner.fetch, inbox).ask, weighing=Weigher(runner.weigh, inbox))
    try:
        connection.sendall(encode([offered(hello, runner)]))
        run(engine, inbox, lambda events: connection.sendall(encode(events)))
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the parent is gone
    except Exception as failure:  # the last line before the process ends
        log.critical("the engine ends", extra=at(failure))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
