"""The control agent: answers the controller's calls, one operation's worth of state in one process.

A call is {"id", "call", "args"}; it is answered by {"id", "ok"} or {"id", "error": {"kind", "message"}}, and before
that perhaps by {"id", "progress"}. Calls run side by side. The end of the input, or silence, means that the controller
is gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from typing import Any, Callable, Dict, List, Optional, Tuple

from kvm_clone.agent import watchdog
from kvm_clone.agent.digests import hashing
from kvm_clone.agent.digests.service import DigestService
from kvm_clone.agent.disks import chain
from kvm_clone.agent.disks.image_lock import ImageLock
from kvm_clone.agent.host import host_info, peer, things, uses
from kvm_clone.agent.protocol.errors import INTERRUPTED, UNSUPPORTED, AgentError, from_exception
from kvm_clone.agent.protocol.wire import ChannelData, ProtocolError, pack_channel, pack_frame, read_any, write_all
from kvm_clone.agent.relay import Relay
from kvm_clone.agent.staging import hold, leftovers, scratch, stage

SILENCE_SECONDS = 30.0
"""Without a frame for so long, the controller is taken for dead: it sends one every few seconds. A cut network closes
no connection, and a lock must not stay behind."""

_MOST_WORDS = 16 * 1024
"""Characters of an error's text that are sent: a child's last line can be of any length."""


class Server:
    """Serves one controller over a pair of descriptors."""

    def __init__(self, source: int, out: int) -> None:
        self._source = source
        self._out = out
        self._writing = threading.Lock()
        self._locking = threading.Lock()
        self._locks: Dict[str, ImageLock] = {}
        self._digests = DigestService()
        self._watchdog = watchdog.Watchdog()
        self._beginning = threading.Lock()
        self._over = False
        self._hold: Optional[hold.Hold] = None
        self._relays: Dict[int, Relay] = {}
        self._channels = 0  # no number is given twice: data for a channel that has ended reaches nobody
        self._calls: Dict[str, Callable[..., Any]] = {
            "ping": lambda: None,
            "host": host_info.host,
            "disk": host_info.disk,
            "directory": host_info.directory,
            "exists": os.path.exists,
            "look": things.look,
            "resources": things.resources,
            "probe": peer.probe,
            "lock_image": self._lock_image,
            "unlock_images": self._unlock_images,
            "fingerprint": host_info.image_fingerprint,
            "fingerprints": host_info.fingerprints,
            "uses": self._uses,
            "marks": host_info.marks,
            "digests": hashing.supported,
            "digest": self._digests.segments,
            "blocks": self._digests.blocks,
            "dirty": host_info.dirty,
            "free": host_info.free,
            "reader": watchdog.reader,
            "guard": self._watchdog.watch,
            "freezing": self._watchdog.freezing,
            "unguard": self._watchdog.done,
            "relay": self._relay,
            "data_in": host_info.data_in,
            "ranges_of": host_info.ranges_of,
            "staged": leftovers.staged,
            "record_outcome": leftovers.record_outcome,
            "sweep": leftovers.sweep,
            "recover": leftovers.recover,
            "remove_scratch": scratch.remove,
            "hold": lambda **how: self._begin(hold.Hold, **how),
            "stage": lambda **how: self._begin(stage.Stage, **how),
            "remove": lambda **how: self._held().remove(**how),
            "release": lambda: self._held().release(),
            "unmark": lambda: self._staged().unmark(),
            "create": lambda **how: self._staged().create(**how),
            "publish": lambda **how: self._staged().publish(**how),
            "note": lambda **how: self._staged().note(**how),
            "overlays": lambda: self._staged().overlays(),
            "merge": lambda: self._staged().merge(),
            "merged": lambda: self._staged().merged(),
            "seal": lambda: self._staged().seal(),
            "undo": lambda **how: self._staged().undo(**how),
            "finish": lambda: self._staged().finish(),
        }

    def serve(self) -> None:
        """Answer until the controller is gone, then undo what it left unfinished."""
        try:
            while (frame := read_any(self._source, self._wait)) is not None:
                if self._hold is not None:
                    self._hold.renew()
                if isinstance(frame, ChannelData):
                    self._pass_on(frame)
                else:
                    self._begin_answer(frame)
        except EOFError:
            return  # torn in the midst of a frame, or silent: gone all the same
        finally:
            with self._beginning:
                self._over = True
            try:
                if self._hold is not None:
                    self._hold.abandon()
            finally:
                self._watchdog.step_in()

    def _wait(self) -> None:
        if not select.select([self._source], [], [], SILENCE_SECONDS)[0]:
            raise EOFError("the controller is silent")

    def _begin_answer(self, frame: Dict[str, Any]) -> None:
        try:
            threading.Thread(target=self._answer, args=(frame,), daemon=True).start()
        except (RuntimeError, MemoryError) as error:
            self._fail(frame.get("id"), from_exception(error))

    def _answer(self, frame: Dict[str, Any]) -> None:
        number, name = frame.get("id"), frame.get("call")
        try:
            call = self._calls.get(str(name))
            if call is None:
                raise AgentError(UNSUPPORTED, f"the agent has no call {name!r}")
            arguments = dict(frame.get("args") or {})
            if call == self._digests.segments:
                arguments["progress"] = lambda state: self._write(pack_frame({"id": number, "progress": state}))
            answer = {"id": number, "ok": call(**arguments)}
            try:
                packed = pack_frame(answer)
            except ProtocolError as error:
                raise from_exception(error, f"the answer to {name}") from error
            self._write(packed)
        except Exception as error:  # noqa: BLE001 - whatever went wrong is the answer
            self._fail(number, from_exception(error))

    def _fail(self, number: Any, error: AgentError) -> None:
        """Answer with an error. When even that cannot be had, end: the controller would wait for ever."""
        try:
            answer = AgentError(error.kind, str(error)[:_MOST_WORDS]).as_dict()
            self._write(pack_frame({"id": number, "error": answer}))
        except Exception as failure:  # noqa: BLE001 - memory that is used up, most likely
            os.write(2, f"kvm-clone: no answer could be given: {type(failure).__name__}\n".encode())
            os.kill(os.getpid(), signal.SIGTERM)

    def _write(self, packed: bytes) -> None:
        # A controller that does not listen any more is gone: the end of our input will say so.
        with self._writing, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            write_all(self._out, packed)

    def _relay(self, fenced: bool) -> int:
        """Open libvirt's socket; the number of the channel that carries it.

        `fenced`: only while this process holds the lock of an operation, which it releases after the last answer.
        """
        held = self._held() if fenced else None
        self._channels += 1
        channel = self._channels

        def put(data: bytes) -> None:
            self._write(pack_channel(channel, data))
            if not data:
                self._relays.pop(channel, None)

        self._relays[channel] = Relay(host_info.LIBVIRT_SOCKETS, put, held)
        return channel

    def _pass_on(self, frame: ChannelData) -> None:
        relay = self._relays.get(frame.channel)
        if relay is not None:
            relay.send(frame.data)

    def _lock_image(self, path: str, image_format: str) -> None:
        """Keep every QEMU from writing this image until `unlock_images`, or until this process ends.

        What it rests on is locked too, each before what that rests on is read. A chain that cannot be established is
        locked as far as it is: `disk` says what is wrong with it.
        """
        with self._locking, contextlib.suppress(chain.UnknownError):
            for node in chain.walk(path, image_format):
                self._lock_file(node.path)

    def _lock_file(self, path: str) -> None:
        """Lock one file, which several images may rest on, unless this process has the lock."""
        try:
            held = self._locks.get(path)
            if held is not None and held.file_id == _file_id(path):
                return
            lock = ImageLock(path)
        except OSError as error:
            raise from_exception(error, f"opening {path}") from error
        if held is not None:  # another file has got this name since
            held.release()
        self._locks[path] = lock

    def _unlock_images(self) -> None:
        """Let others write the images again."""
        with self._locking:
            while self._locks:
                self._locks.popitem()[1].release()

    def _uses(self, **question: Any) -> List[Dict[str, Any]]:
        """See uses.uses. The images that this process itself keeps from being written do not count as used by it."""
        return uses.uses(**question, held=[lock.file_id for lock in list(self._locks.values())])

    def _begin(self, kind: Callable[..., hold.Hold], **how: Any) -> None:
        with self._beginning:
            if self._over:
                raise AgentError(INTERRUPTED, "the controller is gone")
            if self._hold is not None and not self._hold.is_over:
                raise AgentError(UNSUPPORTED, "this agent has an operation already")
            self._hold = kind(**how)

    def _held(self) -> hold.Hold:
        if self._hold is None:
            raise AgentError(UNSUPPORTED, "this agent has no operation")
        return self._hold

    def _staged(self) -> stage.Stage:
        if not isinstance(self._hold, stage.Stage):
            raise AgentError(UNSUPPORTED, "this agent has no operation")
        return self._hold


def _file_id(path: str) -> Tuple[int, int]:
    about = os.stat(path)
    return about.st_dev, about.st_ino
