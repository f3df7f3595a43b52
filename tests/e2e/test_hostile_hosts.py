"""Hosts whose logins print much or are held to tight limits: one error, or the clone; nothing is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from clonekit import assert_equal, assert_nothing_left, kvm_clone, leftovers, picture, remove, wipe
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

HOSTS = ("kc-a", "kc-b")
ROUTES = ("direct", pytest.param("relay", marks=pytest.mark.faults))
"""`make test` takes the one, `make test-faults` both."""

RC = "/root/.ssh/login_rc"
"""On each host; mounted over the login's own, which all hosts of the lab share."""

LINES = "yes banner | head -c {}"
WITHOUT_END = "head -c {} /dev/zero | tr '\\0' x"


@pytest.fixture(scope="module")
def web(lab: Lab) -> Iterator[Vm]:
    """A VM with a disk of each format."""
    yield lab.vm("kc-a", "hostile", ["qcow2:8M:1M", "raw:8M:1M"], boot=False)
    remove(lab, "kc-a", "hostile")


Login = Callable[[str, str], None]


@pytest.fixture
def login(lab: Lab) -> Iterator[Login]:
    """Lets each login of a host run a command first."""
    touched: list[str] = []

    def run_first(host: str, command: str) -> None:
        touched.append(host)
        lab.outside(host, RC).write_text(f"{command}\n")
        lab.run(host, "mount", "--bind", RC, "/root/.bashrc")

    yield run_first
    for host in touched:
        lab.run(host, "umount", "/root/.bashrc")
        lab.outside(host, RC).unlink(missing_ok=True)
    if leftovers(lab, "kc-b") or picture(lab, "kc-b").domains.strip():
        wipe(lab)


def clone(lab: Lab, *argv: str, seconds: float = 60) -> tuple[int, str]:
    """Exit code and what was said; in time, and without a traceback."""
    begun = time.monotonic()
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "hostile", "-q", *argv)
    assert time.monotonic() - begun < seconds, done.err
    assert "Traceback" not in done.err
    return done.code, done.err


def one_error(said: str) -> str:
    """The error, which there is one of."""
    lines = [line for line in said.splitlines() if line.startswith("kvm-clone: ")]
    assert len(lines) == 1, said
    return lines[0]


SURVIVED = {
    "200 KB on stdout": LINES.format(200_000),
    "200 KB on stdout in one line": WITHOUT_END.format(200_000),
    "5 MB on stderr": f"({LINES}) >&2".format(5_000_000),
    "5 MB on stderr in one line": f"({WITHOUT_END}) >&2".format(5_000_000),
}


@pytest.mark.parametrize("route", ["auto", "relay"])
@pytest.mark.parametrize("name", SURVIVED)
def test_a_login_that_prints_is_no_hindrance(lab: Lab, web: Vm, login: Login, name: str, route: str) -> None:
    for host in HOSTS:
        login(host, SURVIVED[name])
    code, said = clone(lab, "--route", route)
    assert code == 0, said
    assert_equal(lab, web)
    assert_nothing_left(lab)


def test_the_direct_route_is_taken_past_the_noise(lab: Lab, web: Vm, login: Login) -> None:
    login("kc-b", f"({LINES}) >&2; {LINES}".format(1_000_000, 100_000))
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "hostile", "-q", "--output", "json")
    assert done.code == 0, done.err
    assert done.document["route"] == "direct"


TOO_MUCH = {
    "2 MB on stdout": LINES.format(2_000_000),
    "10 MB on stdout in one line": WITHOUT_END.format(10_000_000),
    "stdout without end": "yes banner",
    "stdout without end or line": "cat /dev/zero",
}


@pytest.mark.parametrize("host", [pytest.param("kc-a", marks=pytest.mark.faults), "kc-b"])
@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_login_that_prints_without_end_is_one_error(lab: Lab, web: Vm, login: Login, name: str, host: str) -> None:
    before = {there: picture(lab, there) for there in HOSTS}
    login(host, TOO_MUCH[name])
    code, said = clone(lab, seconds=30)
    assert code == 5, said
    assert one_error(said) == (
        f"kvm-clone: cannot connect to {host}: the login prints without end instead of running the agent"
    )
    assert_nothing_left(lab)
    assert {there: picture(lab, there) for there in HOSTS} == before


def test_a_list_of_hosts_of_which_one_prints_without_end(lab: Lab, login: Login) -> None:
    login("kc-b", "yes banner")
    done = kvm_clone(lab, "list", "kc-a", "kc-b", seconds=60)
    assert done.code == 5
    assert "kc-b: the login prints without end" in done.out + done.err
    assert "Traceback" not in done.err


LOADING = {"files of 10 KiB": "ulimit -f 10", "20 MB of memory": "ulimit -v 20000"}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", LOADING)
def test_an_agent_that_cannot_start_is_one_error(lab: Lab, web: Vm, login: Login, name: str, host: str) -> None:
    login(host, LOADING[name])
    code, said = clone(lab)
    assert code == 3, said
    assert one_error(said).startswith(f"kvm-clone: {host}: the agent cannot run here: ")
    assert "ulimit -a" in said
    assert_nothing_left(lab)


HINDERED = {
    "8 open files": "ulimit -n 8",
    "12 open files": "ulimit -n 12",
    "40 MB of memory": "ulimit -v 40000",
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", HINDERED)
def test_limits_that_are_too_tight_are_one_error(
    lab: Lab, web: Vm, login: Login, name: str, host: str, route: str
) -> None:
    before = {there: picture(lab, there) for there in HOSTS}
    login(host, HINDERED[name])
    code, said = clone(lab, "--route", route, "--retries", "0", "--no-keep-partial")
    assert code in (3, 5, 6), said
    assert "Too many open files" in said or "limits forbid" in said or "Resource temporarily unavailable" in said
    assert host in said or code == 3
    assert_nothing_left(lab)
    assert {there: picture(lab, there) for there in HOSTS} == before


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("blocks", "expected"), [(700, 3), (4000, 6)])
def test_files_that_may_not_grow_are_one_error(
    lab: Lab, web: Vm, login: Login, blocks: int, expected: int, route: str
) -> None:
    """A limit that the inspection's own try meets is told there; a wider one is met by the copy."""
    before = picture(lab, "kc-b")
    login("kc-b", f"ulimit -f {blocks}")
    code, said = clone(lab, "--route", route)
    assert code == expected, said
    assert "File too large" in said or "No space left" in said
    assert_nothing_left(lab)
    assert picture(lab, "kc-b") == before


ENOUGH = {"300 MB of memory": "ulimit -v 300000", "24 open files": "ulimit -n 24", "20 processes": "ulimit -u 20"}


@pytest.mark.parametrize("name", ENOUGH)
def test_limits_that_are_enough_are_no_hindrance(lab: Lab, web: Vm, login: Login, name: str) -> None:
    for host in HOSTS:
        login(host, ENOUGH[name])
    code, said = clone(lab)
    assert code == 0, said
    assert_equal(lab, web)
    assert_nothing_left(lab)
