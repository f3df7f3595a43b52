"""kvm-clone that stops itself (SIGSTOP) once the destination has journalled a record: `held.py RECORD ARGV…`.

Only the first such record stops it; it goes on when it gets SIGCONT. `before CALL` stops it before that call of the
agent. With `torn RECORD` nothing is stopped: the destination's agent kills itself when it has written half of that
record, or, with `torn nothing`, when it has made the journal and written nothing.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import zipfile
from typing import Any

from kvm_clone.cli import main
from kvm_clone.hosts import payload
from kvm_clone.hosts.agent_link import AgentLink

WRITES = {"stage": "begin", "create": "create", "publish": "publish", "merge": "merged"}
"""The record that a call of the agent writes; `note` writes the one that it is given."""


def hold_at(record: str) -> None:
    """Wrap the calls to agents."""
    call = AgentLink.call
    held: list[str] = []

    def hold() -> None:
        if not held:
            held.append(record)
            os.kill(os.getpid(), signal.SIGSTOP)

    async def holding(self: AgentLink, name: str, progress: Any = None, /, **arguments: Any) -> Any:
        if record == f"before {name}":
            hold()
        answer = await call(self, name, progress, **arguments)
        if record in (WRITES.get(name), arguments.get("record")):
            hold()
        return answer

    AgentLink.call = holding  # type: ignore[method-assign]


_WRITE = "        if os.write(self._fd, line) != len(line):\n"
"""What agent/staging/journal.py does with a record."""


def tear(record: str) -> None:
    """Let agents be of a package whose journal breaks off within the record."""
    when, half = ("not self.records", 0) if record == "nothing" else (f"record == {record!r}", 2)
    written = f"line[:len(line) // {half}]" if half else "b''"
    broken = f"        if {when}:\n            os.write(self._fd, {written})\n            os.kill(os.getpid(), 9)\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(payload.package())) as whole, zipfile.ZipFile(buffer, "w") as archive:
        for entry in whole.infolist():
            content = whole.read(entry)
            if entry.filename.endswith("agent/staging/journal.py"):
                assert content.count(_WRITE.encode()) == 1
                content = content.replace(_WRITE.encode(), (broken + _WRITE).encode())
            if not entry.filename.endswith("agent/staging/journal.pyc"):
                archive.writestr(entry, content)
    package = buffer.getvalue()
    payload.package = lambda: package  # type: ignore[assignment]


if __name__ == "__main__":
    point = sys.argv.pop(1)
    if point.startswith("torn "):
        tear(point.removeprefix("torn "))
    else:
        hold_at(point)
    main()
