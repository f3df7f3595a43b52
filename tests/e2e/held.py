"""kvm-clone that stops itself (SIGSTOP) once the destination has journalled a record: `held.py RECORD ARGV…`.

Only the first such record stops it; it goes on when it gets SIGCONT. `before CALL` stops it before that call of the
agent.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from kvm_clone.cli import main
from kvm_clone.host import Host

WRITES = {"stage": "begin", "create": "create", "publish": "publish", "merge": "merged"}
"""The record that a call of the agent writes; `note` writes the one that it is given."""


def hold_at(record: str) -> None:
    """Wrap the calls to agents."""
    call = Host.call
    held: list[str] = []

    def hold() -> None:
        if not held:
            held.append(record)
            os.kill(os.getpid(), signal.SIGSTOP)

    async def holding(self: Host, name: str, progress: Any = None, /, **arguments: Any) -> Any:
        if record == f"before {name}":
            hold()
        answer = await call(self, name, progress, **arguments)
        if record in (WRITES.get(name), arguments.get("record")):
            hold()
        return answer

    Host.call = holding  # type: ignore[method-assign]


if __name__ == "__main__":
    hold_at(sys.argv.pop(1))
    main()
