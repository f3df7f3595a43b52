"""Where the agent begins: the loader has put the package on sys.path and calls `main`.

The first frame says what this process is: {"mode": "control"}, {"mode": "send", …} or {"mode": "receive", …}. A sender
hears what it is to send with its start; it hands the receiver's own first frame on.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Dict, List, NoReturn, Optional

from kvm_clone.agent import names, process, server, transfer
from kvm_clone.agent.host import peer
from kvm_clone.agent.protocol.errors import INTERRUPTED, PROTOCOL, AgentError, from_exception
from kvm_clone.agent.protocol.stream import enlarge_pipe
from kvm_clone.agent.protocol.wire import MARKER, pack_frame, read_frame, write_all
from kvm_clone.agent.staging.lock import holder_of

FAILED = 3
"""Exit status of an agent that could not do its work and has said why."""


PATIENCE_SECONDS = 90.0
"""How long an agent waits for its first frame; streams are set up ahead of that, see transport.READY_SECONDS."""


_LOOK_SECONDS = 1.0
"""How often a receiver looks whether its operation's agent lives."""


def main(payload: str, version: str) -> NoReturn:
    """Be the agent. `payload` is the path that the package was loaded from, `version` the line after the marker."""
    # Nothing but the protocol may reach the output: what libraries print goes to stderr, which is for people.
    out = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))
    try:
        write_all(out, b"\n" + MARKER + version.encode() + b"\n")
        request = _next_frame()
        if request is None:
            _exit(0)
        mode = request.get("mode")
        if mode == "control":
            server.Server(0, out).serve()
        elif mode == "send":
            _send(request, out, payload)
        elif mode == "receive":
            _receive(request, out)
        else:
            raise AgentError(PROTOCOL, f"the agent has no mode {mode!r}")
    except Exception as error:  # noqa: BLE001 - one line is what the controller reports to its user
        print(f"kvm-clone: {from_exception(error)}", file=sys.stderr, flush=True)
        _exit(FAILED)
    _exit(0)


def _next_frame() -> Optional[Dict[str, Any]]:
    """The frame that says what to do. A cut network closes no connection: who waits in vain gives up."""
    return read_frame(0, _wait)


def _wait() -> None:
    if not select.select([0], [], [], PATIENCE_SECONDS)[0]:
        raise AgentError(INTERRUPTED, f"the controller said nothing for {PATIENCE_SECONDS:.0f} seconds")


def _exit(status: int) -> NoReturn:
    # Threads may be in the midst of calls that nobody waits for any more.
    sys.stderr.flush()
    os._exit(status)


def _jobs(request: Dict[str, Any]) -> List[transfer.Job]:
    return [transfer.Job(**job) for job in request["jobs"]]


def _send(request: Dict[str, Any], out: int, payload: str) -> None:
    """Send the disks when the controller says go: to our own output, or to a receiver that we reach by ssh."""
    child: Optional[subprocess.Popen[bytes]] = None
    if request.get("ssh"):
        child = _start_receiver(request, out, payload)
        os.close(out)  # the receiver's answers alone go there now
        assert child.stdin is not None
        out = child.stdin.fileno()
    enlarge_pipe(out)
    go = _next_frame()
    if go is None:
        _exit_if_ended(child)
        raise AgentError(INTERRUPTED, "the controller went away")
    threading.Thread(target=_exit_with_controller, daemon=True).start()
    try:
        if child is not None:
            write_all(out, pack_frame(go["receive"]))
        transfer.Sender(out, _jobs(go), go["parallel"], go["bandwidth_limit"]).run()
    finally:
        os.close(out)
    if child is not None and child.wait():
        raise AgentError(INTERRUPTED, f"the receiver ended with status {child.returncode}")


def _exit_with_controller() -> None:
    """End this process, and with it the stream, when the controller closes our input."""
    while os.read(0, 4096):
        pass
    os._exit(FAILED)


def _exit_with_operation(lock: str) -> None:
    """End this process soon after the operation's agent has ended, which holds the lock.

    A source that has lost its power closes no connection: the next run would wait for one that waits for nobody.
    """
    while (holder := _holder(lock)) is None:
        time.sleep(_LOOK_SECONDS)
    while holder and _holder(lock) in (holder, None):
        time.sleep(_LOOK_SECONDS)
    if holder:
        os._exit(FAILED)


def _holder(lock: str) -> Optional[str]:
    """Who holds the lock, None when that is not known now: a limit may leave no descriptor to look with."""
    try:
        return holder_of(lock)
    except OSError:
        return None


def _start_receiver(request: Dict[str, Any], out: int, payload: str) -> subprocess.Popen[bytes]:
    """Start the receiver on the destination: ssh, and the loader's input."""
    argv = peer.command(request["ssh"], request["known_hosts"])
    child = process.start([*argv, request["command"]], stdin=subprocess.PIPE, stdout=out)
    assert child.stdin is not None
    enlarge_pipe(child.stdin.fileno())
    with open(payload, "rb") as file:
        package = file.read()
    try:
        write_all(child.stdin.fileno(), request["preamble"].encode() + package)
    except BrokenPipeError:
        child.wait()
        _exit_if_ended(child)
        raise
    return child


def _exit_if_ended(child: Optional[subprocess.Popen[bytes]]) -> None:
    """When ssh has failed, its own last words are on our stderr, and nothing of ours may stand before them."""
    if child is not None and child.poll():
        _exit(FAILED)


def _receive(request: Dict[str, Any], out: int) -> None:
    """Write what comes; every answer is a frame: {"written": […]}, and at the end {"done": true} or {"error": …}."""
    jobs = _jobs(request)
    if request.get("vm"):
        threading.Thread(target=_exit_with_operation, args=(names.lock_path(request["vm"]),), daemon=True).start()
    try:
        transfer.Receiver(
            0,
            jobs,
            lambda written: write_all(out, pack_frame({"written": written})),
            lambda durable: write_all(out, pack_frame({"durable": durable})),
        ).run()
    except Exception as error:  # noqa: BLE001 - whatever went wrong is the answer
        write_all(out, pack_frame({"error": from_exception(error).as_dict()}))
        _exit(FAILED)
    write_all(out, pack_frame({"done": True}))
