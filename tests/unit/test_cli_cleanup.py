"""What a cleanup writes into the logs of this machine: what it has not seen is not taken for gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from clihelp import Run, in_this_process, own_home  # noqa: F401 - fixtures

from kvm_clone.cli import status
from kvm_clone.errors import ExitCode, KvmCloneError, RefusedError
from kvm_clone.results import StagedListing
from kvm_clone.upkeep import operation_log
from kvm_clone.upkeep.leftovers import StagedData
from kvm_clone.upkeep.operation_log import FAILED, KEPT, OperationLog

NAME = "0123456789ab"
ABOUT = {"source": "kc-a", "destination": "kc-b", "vm": "web", "name": "copy", "action": "clone", "command": "clone"}
PLACES = ("/srv/images", "/var/lib/libvirt/images")


def data(**about: object) -> StagedData:
    return StagedData("kc-b", "/srv/images", "/srv/images/.kvm-clone-copy.journal", NAME, "copy", "kc-a", **about)  # type: ignore[arg-type]


DATA = data()
RUNS = data(active=True)
ELSEWHERE = data(foreign="kc-a")
OTHER = StagedData("kc-b", "/srv/images", "/srv/images/.kvm-clone-db.journal", "ba9876543210", "db", "kc-a")
FAILURE: KvmCloneError = RefusedError("it was left as it is", subject="copy")

GONE = "cleaned up: nothing of it is staged in /srv/images, /var/lib/libvirt/images"
CASES: dict[str, tuple[StagedListing, tuple[str, ...], str]] = {
    "removed": (StagedListing("kc-b", (DATA,), {DATA.path: "removed"}), PLACES, "cleaned up: removed"),
    "finished": (StagedListing("kc-b", (DATA,), {DATA.path: "it had committed"}), (), "cleaned up: it had committed"),
    "could not be removed": (StagedListing("kc-b", (DATA,), errors=(FAILURE,)), PLACES, ""),
    "left to its host": (StagedListing("kc-b", (ELSEWHERE,), {ELSEWHERE.path: "left to kc-a"}), PLACES, ""),
    "running": (StagedListing("kc-b", active=(RUNS,)), PLACES, ""),
    "nowhere": (StagedListing("kc-b"), PLACES, GONE),
    "another one there": (StagedListing("kc-b", (OTHER,), {OTHER.path: "removed"}), PLACES, GONE),
    "something there could not be read": (StagedListing("kc-b", errors=(FAILURE,)), PLACES, ""),
    "another host": (StagedListing("kc-c"), PLACES, ""),
}


def after(
    here: Run, monkeypatch: pytest.MonkeyPatch, listing: StagedListing, places: tuple[str, ...], *words: str
) -> tuple[str, str, str]:
    """The operation's state and text after a cleanup that found this, and what it printed on stderr."""

    async def found(*_: object, **__: object) -> list[StagedListing]:
        return [listing]

    monkeypatch.setattr(status, "_clean", found)
    about = {**ABOUT, "directories": operation_log.joined(places)} if places else ABOUT
    OperationLog(NAME, **about).end(KEPT)
    done = here("cleanup", listing.host, *words)
    assert done.code == (ExitCode.REFUSED if listing.errors else ExitCode.DONE)
    one = operation_log.read(NAME)
    assert one is not None
    return one.state, one.text, done.err


@pytest.mark.parametrize("case", CASES)
def test_an_operation_that_was_cleaned_up_is_not_resumed(
    here: Run, monkeypatch: pytest.MonkeyPatch, home: Path, case: str
) -> None:
    listing, places, text = CASES[case]
    state, said, err = after(here, monkeypatch, listing, places)
    assert (state, said) == (FAILED if text else KEPT, text)
    assert "--resume" not in err


@pytest.mark.parametrize("words", [("--dry-run",), ("--older-than", "1h")])
def test_a_cleanup_that_leaves_things_ends_nothing(
    here: Run, monkeypatch: pytest.MonkeyPatch, home: Path, words: tuple[str, ...]
) -> None:
    assert after(here, monkeypatch, StagedListing("kc-b"), PLACES, *words) == (KEPT, "", "")


def test_what_may_be_staged_elsewhere_is_said(here: Run, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """The log of an older version does not say where the operation staged its data."""
    state, _, err = after(here, monkeypatch, StagedListing("kc-b"), ())
    assert state == KEPT
    assert err.splitlines() == [
        f"kvm-clone: nothing of operation {NAME} (web as copy) is staged in the directories of kc-b's storage pools; "
        "its log does not say where else it may be",
        "  what to do: kvm-clone clone kc-a kc-b web --new-name copy --resume finishes it, --force instead of --resume "
        "discards it",
    ]


def test_a_running_operation_is_named(here: Run, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    async def found(*_: object, dry_run: bool, **__: object) -> list[StagedListing]:
        return [StagedListing("kc-b", (RUNS,)) if dry_run else StagedListing("kc-b", active=(RUNS,))]

    monkeypatch.setattr(status, "_clean", found)
    done = here("cleanup", "kc-b")
    assert done.out.splitlines() == ["kc-b: copy: left as it is, its operation is running", "nothing to remove"]
    assert "would be left as it is: its operation is running" in here("cleanup", "kc-b", "--dry-run").out
