"""kvm-clone that stops itself (SIGSTOP) at a point of a backup's begin: `held_live.py POINT ARGV…`.

    look    both hosts are inspected, and the plan is about to be made
    freeze  the source's agent knows that the guest is about to be frozen
    frozen  the guest is frozen
    begun   the backup job has begun
    define  the clone is about to be defined

With `POINT:term` it sends itself SIGTERM instead, and goes on. Only the first time; it goes on when it gets SIGCONT.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from kvm_clone.cli import main
from kvm_clone.hosts import domains, live
from kvm_clone.planning import plan as planning
from kvm_clone.planning import sync

AFTER_TERM_SECONDS = 0.5
"""Longer than the event loop needs to hear of the signal."""


def hold_at(point: str, number: signal.Signals) -> None:
    """Wrap what is called there."""

    def hold() -> None:
        if held:
            return
        held.append(point)
        os.kill(os.getpid(), number)
        if number is signal.SIGTERM:
            time.sleep(AFTER_TERM_SECONDS)

    held: list[str] = []

    def around(module: Any, name: str, *, before: bool) -> None:
        call: Callable[..., Any] = getattr(module, name)

        def holding(*arguments: Any, **options: Any) -> Any:
            if before:
                hold()
            answer = call(*arguments, **options)
            if not before:
                hold()
            return answer

        setattr(module, name, holding)

    for module, name, before in POINTS[point]:
        around(module, name, before=before)


POINTS = {
    "look": [(planning, "live_findings", True), (sync, "live_findings", True)],
    "freeze": [(live, "freeze", True)],
    "frozen": [(live, "freeze", False)],
    "begin": [(live, "begin", True)],
    "begun": [(live, "begin", False)],
    "define": [(domains, "define", True)],
}
"""What is wrapped for each point, and whether it is called before or after it."""


if __name__ == "__main__":
    where, _, how = sys.argv.pop(1).partition(":")
    hold_at(where, signal.SIGTERM if how == "term" else signal.SIGSTOP)
    main()
