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
from typing import Any, Callable, Dict, Optional

from . import facts, guard, hashing, peer, stage
from .differ import Differ
from .errors import INTERRUPTED, UNSUPPORTED, AgentError, from_exception
from .lock import ImageLock
from .wire import ProtocolError, pack_frame, read_frame, write_all

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
        self._locks: Dict[str, ImageLock] = {}
        self._differ = Differ()
        self._guard = guard.Guard()
        self._beginning = threading.Lock()
        self._over = False
        self._stage: Optional[stage.Stage] = None
        self._calls: Dict[str, Callable[..., Any]] = {
            "ping": lambda: None,
            "host": facts.host,
            "disk": facts.disk,
            "directory": facts.directory,
            "exists": os.path.exists,
            "probe": peer.probe,
            "lock_image": self._lock_image,
            "unlock_images": self._unlock_images,
            "fingerprint": facts.fingerprint,
            "digests": hashing.supported,
            "digest": self._differ.segments,
            "blocks": self._differ.blocks,
            "dirty": facts.dirty,
            "free": facts.free,
            "reader": guard.reader,
            "guard": self._guard.watch,
            "freezing": self._guard.freezing,
            "unguard": self._guard.done,
            "data_in": facts.data_in,
            "ranges_of": facts.ranges_of,
            "staged": stage.staged,
            "settle": stage.settle,
            "recover": stage.recover,
            "remove_files": stage.remove_files,
            "backing_files": facts.backing_files,
            "stage": self._begin,
            "create": lambda **how: self._staged().create(**how),
            "publish": lambda **how: self._staged().publish(**how),
            "note": lambda **how: self._staged().note(**how),
            "overlays": lambda: self._staged().overlays(),
            "merge": lambda: self._staged().merge(),
            "merged": lambda: self._staged().merged(),
            "seal": lambda: self._staged().seal(),
            "undo": lambda **how: self._staged().undo(**how),
            "finish": lambda: self._staged().finish(),
            "release": lambda: self._staged().release(),
        }

    def serve(self) -> None:
        """Answer until the controller is gone, then undo what it left unfinished."""
        try:
            while (frame := read_frame(self._source, self._wait)) is not None:
                self._begin_answer(frame)
        except EOFError:
            return  # torn in the midst of a frame, or silent: gone all the same
        finally:
            with self._beginning:
                self._over = True
            if self._stage is not None:
                self._stage.abandon()
            self._guard.step_in()

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
            if call == self._differ.segments:
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

    def _lock_image(self, path: str) -> None:
        """Keep every QEMU from writing this image until `unlock_images`, or until this process ends."""
        try:
            self._locks[path] = ImageLock(path)
        except OSError as error:
            raise from_exception(error, f"opening {path}") from error

    def _unlock_images(self) -> None:
        """Let others write the images again."""
        while self._locks:
            self._locks.popitem()[1].release()

    def _begin(self, **how: Any) -> None:
        with self._beginning:
            if self._over:
                raise AgentError(INTERRUPTED, "the controller is gone")
            if self._stage is not None and not self._stage.is_over:
                raise AgentError(UNSUPPORTED, "this agent has an operation already")
            self._stage = stage.Stage(**how)

    def _staged(self) -> stage.Stage:
        if self._stage is None:
            raise AgentError(UNSUPPORTED, "this agent has no operation")
        return self._stage
