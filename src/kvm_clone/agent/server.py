"""The control agent: answers the controller's calls, one operation's worth of state in one process.

A call is {"id", "call", "args"}; it is answered by {"id", "ok"} or {"id", "error": {"kind", "message"}}, and before
that perhaps by {"id", "progress"}. Calls run side by side. The end of the input, or silence, means that the controller
is gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import Any, Callable, Dict, Optional

from . import facts, guard, hashing, peer, stage, things
from .differ import Differ
from .errors import INTERRUPTED, UNSUPPORTED, AgentError, from_exception
from .lock import ImageLock
from .wire import pack_frame, read_frame, write_all

SILENCE_SECONDS = 30.0
"""Without a frame for so long, the controller is taken for dead: it sends one every few seconds. A cut network closes
no connection, and a lock must not stay behind."""


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
            "look": things.look,
            "resources": things.resources,
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
            while self._heard():
                frame = read_frame(self._source)
                if frame is None:
                    break
                threading.Thread(target=self._answer, args=(frame,), daemon=True).start()
        except EOFError:
            return  # torn in the midst of a frame: gone all the same
        finally:
            with self._beginning:
                self._over = True
            if self._stage is not None:
                self._stage.abandon()
            self._guard.step_in()

    def _heard(self) -> bool:
        readable, _, _ = select.select([self._source], [], [], SILENCE_SECONDS)
        return bool(readable)

    def _answer(self, frame: Dict[str, Any]) -> None:
        number = frame.get("id")
        try:
            call = self._calls.get(str(frame.get("call")))
            if call is None:
                raise AgentError(UNSUPPORTED, f"the agent has no call {frame.get('call')!r}")
            arguments = dict(frame.get("args") or {})
            if call == self._differ.segments:
                arguments["progress"] = lambda state: self._write({"id": number, "progress": state})
            self._write({"id": number, "ok": call(**arguments)})
        except Exception as error:  # noqa: BLE001 - whatever went wrong is the answer
            self._write({"id": number, "error": from_exception(error).as_dict()})

    def _write(self, message: Dict[str, Any]) -> None:
        # A controller that does not listen any more is gone: the end of our input will say so.
        with self._writing, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            write_all(self._out, pack_frame(message))

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
