"""host_paths.py: the names of logs and sockets that another VM of the destination has already."""

from __future__ import annotations

import posixpath

import pytest
from cases import ONE_DISK, Case
from hypothesis import given
from hypothesis import strategies as st

from kvm_clone.definition.references import references
from kvm_clone.options import CloneOptions
from kvm_clone.planning.clone_xml import clone_xml, planned_mark
from kvm_clone.planning.host_paths import renames
from kvm_clone.planning.things import Objects, plain_path


def serial(path: str, kind: str = "type='file'", source: str = "") -> str:
    return f"<serial {kind}><source {source} path='{path}'/></serial>"


def case(devices: str, *used: str, name: str = "web", new: str | None = "web-2", by: str = "other") -> Case:
    objects = Objects(used={path: frozenset({by}) for path in used})
    return Case(devices=ONE_DISK + devices, name=name, objects=objects, options=CloneOptions(new_name=new))


def renamed(case: Case) -> dict[str, str]:
    return renames(case.facts(), case.options.name_for(case.name))


NAMES = [
    # (path, the VM's name, the clone's, the new path)
    ("/log/slx.log", "sl", "sl2", "/log/slx-sl2.log"),
    ("/log/sl.log", "sl", "sl2", "/log/sl2.log"),
    ("/log/sl-serial.log", "sl", "sl2", "/log/sl2-serial.log"),
    ("/log/serial_sl", "sl", "sl2", "/log/serial_sl2"),
    ("/log/sl.org.qemu.guest_agent.0", "sl", "sl2", "/log/sl2.org.qemu.guest_agent.0"),
    ("/log/plain", "sl", "sl2", "/log/plain-sl2"),
    ("/log/.hidden", "sl", "sl2", "/log/.hidden-sl2"),
    ("/log/sl.sl", "sl", "sl2", "/log/sl2.sl"),
    ("/sl/a.log", "sl", "sl2", "/sl/a-sl2.log"),
    ("/log/a.b.log", "a.b", r"\1", r"/log/\1.log"),
    ("/log/web.log", "web", "web", "/log/web-2.log"),
    ("/log/x.log", "web", "web", "/log/x-web.log"),
    ("/log/x.log", "web", "東 é", "/log/x-東 é.log"),
    ("/log/web.log", "web", "a\tb", "/log/a_b.log"),
]


@pytest.mark.parametrize(("path", "old", "new", "expected"), NAMES)
def test_the_new_name(path: str, old: str, new: str, expected: str) -> None:
    assert renamed(case(serial(path), path, name=old, new=new)) == {path: expected}


def test_the_new_name_is_nobody_elses() -> None:
    taken = ("/log/x.log", "/log/x-web-2.log", "/log/x-web-2-2.log")
    assert renamed(case(serial("/log/x.log"), *taken)) == {"/log/x.log": "/log/x-web-2-3.log"}


def test_two_paths_of_one_vm_stay_two() -> None:
    devices = serial("/log/web.log") + serial("/log/web-2.log") + serial("/log/free.log")
    assert renamed(case(devices, "/log/web.log", "/log/web-2.log")) == {
        "/log/web.log": "/log/web-2-2.log",
        "/log/web-2.log": "/log/web-2-2-2.log",
    }


def test_one_path_under_two_spellings() -> None:
    assert renamed(case(serial("/var/run//x.sock"), "/run/x.sock")) == {"/var/run//x.sock": "/var/run/x-web-2.sock"}


@pytest.mark.parametrize(
    "devices",
    [
        serial("/run/x", "type='unix'", "mode='connect'"),
        serial("/run/x", "type='dev'"),
        serial("/run/x", "type='pipe'"),
        serial("/run/y"),
        "<filesystem><source dir='/run/x'/></filesystem>",
    ],
)
def test_what_keeps_its_name(devices: str) -> None:
    assert renamed(case(devices, "/run/x")) == {}


@pytest.mark.parametrize(
    ("devices", "new"),
    [
        (serial("/run/x.sock", "type='unix'", "mode='bind'"), "/run/x-web-2.sock"),
        ("<graphics type='vnc' socket='/run/x.sock'/>", "/run/x-web-2.sock"),
        ("<channel type='pty'><log file='/run/x.sock'/></channel>", "/run/x-web-2.sock"),
        ("<interface type='vhostuser'><source path='/run/x.sock' mode='server'/></interface>", "/run/x-web-2.sock"),
    ],
)
def test_what_is_made_at_the_start_gets_another(devices: str, new: str) -> None:
    assert renamed(case(devices, "/run/x.sock")) == {"/run/x.sock": new}


def test_the_vm_that_is_replaced_gives_its_names_up() -> None:
    assert renamed(case(serial("/log/x.log"), "/log/x.log", by="web-2")) == {}


def test_a_socket_whose_new_name_would_be_too_long() -> None:
    path = "/run/" + "d" * 90 + "/x.sock"
    assert renamed(case(serial(path, "type='unix'", "mode='bind'"), path)) == {}
    assert renamed(case(serial(path), path)) != {}
    long = "/log/" + "x" * 250 + ".log"
    assert renamed(case(serial(long), long)) == {}


def test_the_definition_has_the_new_name_everywhere() -> None:
    devices = serial("/log/x.log") + serial("/log/x.log").replace("serial", "console") + serial("/log/y.log")
    plan = case(devices, "/log/x.log").plan()
    xml = clone_xml(plan, planned_mark(plan))
    assert [one.value for one in references(xml) if one.made] == ["/log/x-web-2.log"] * 2 + ["/log/y.log"]


FILES = st.sampled_from(["web.log", "x.log", "web", "web-2.log", "web-2-2.log", "x-web-2.log", "a.b.c"])


@given(st.lists(FILES, max_size=4), st.sets(FILES, max_size=6), st.sampled_from(["web", "web-2", "b"]))
def test_no_two_vms_share(own: list[str], others: set[str], new: str) -> None:
    used = {f"/log/{file}" for file in others}
    found = case("".join(serial(f"/log/{file}") for file in own), *used, new=new)
    mapping = renamed(found)
    paths = {f"/log/{file}" for file in own}
    after = [mapping.get(path, path) for path in sorted(paths)]
    assert not {plain_path(path) for path in after} & used
    assert len(set(after)) == len(after)
    assert mapping.keys() == paths & used
    assert all(posixpath.dirname(path) == "/log" for path in after)
