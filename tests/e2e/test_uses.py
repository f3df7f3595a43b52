"""What a replaced VM had is removed only when nobody is known to use it; what cannot be known stays, with a word."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from clonekit import IMAGES, Done, assert_equal, held, kvm_clone, wait_until, wipe
from labclient import Lab, Vm

pytestmark = pytest.mark.e2e

QCOW2 = "qemu-img create -q -f qcow2"


def disk(path: str, format_: str = "qcow2", *, target: str = "vda", inside: str = "") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{format_}'/><source file='{IMAGES}/{path}'/>"
        f"{inside}<target dev='{target}' bus='virtio'/></disk>"
    )


def volume(name: str) -> str:
    return (
        "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
        f"<source pool='default' volume='{name}'/><target dev='vda' bus='virtio'/></disk>"
    )


def define(lab: Lab, name: str, devices: str, more: str = "") -> None:
    xml = (
        f"<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{name}</name>"
        f"<memory unit='MiB'>64</memory><os><type arch='x86_64'>hvm</type></os>"
        f"<devices>{devices}</devices>{more}</domain>"
    )
    lab.run("kc-b", "virsh", "define", "/dev/stdin", input=xml)


@dataclass(frozen=True)
class Case:
    """How files are made in the pool, what the replaced VM and another one have, and whether `watched` may go.

    `words`: what the reason says.
    """

    make: str
    replaced: str
    other: str = ""
    more: str = ""
    watched: str = "x.qcow2"
    stays: bool = True
    words: str = "VM other uses it"


IN_ARGV = (
    "<qemu:commandline><qemu:arg value='-drive'/><qemu:arg value='file={},format=qcow2,if=none'/></qemu:commandline>"
)

CASES = {
    "its alone": Case(f"{QCOW2} x.qcow2 1M; {QCOW2} y.qcow2 1M", disk("x.qcow2"), disk("y.qcow2"), stays=False),
    "beside an image that is missing": Case(
        f"{QCOW2} x.qcow2 1M", disk("x.qcow2"), disk("y.qcow2"), words="is not known"
    ),
    "the same path": Case(f"{QCOW2} x.qcow2 1M", disk("x.qcow2"), disk("x.qcow2")),
    "by a link": Case(f"{QCOW2} x.qcow2 1M; ln -s x.qcow2 l.qcow2", disk("x.qcow2"), disk("l.qcow2")),
    "by a hard link": Case(f"{QCOW2} x.qcow2 1M; ln x.qcow2 h.qcow2", disk("x.qcow2"), disk("h.qcow2")),
    "by pool and volume": Case(f"{QCOW2} x.qcow2 1M", disk("x.qcow2"), volume("x.qcow2")),
    "below a volume": Case(
        f"{QCOW2} x.qcow2 1M; {QCOW2} -b $PWD/x.qcow2 -F qcow2 o.qcow2", disk("x.qcow2"), volume("o.qcow2")
    ),
    "below, by a relative name": Case(
        f"{QCOW2} x.qcow2 1M; {QCOW2} -b x.qcow2 -F qcow2 o.qcow2", disk("x.qcow2"), disk("o.qcow2")
    ),
    "a data file": Case(
        f"{QCOW2} -o data_file=$PWD/x.raw,data_file_raw=on o.qcow2 1M",
        disk("x.raw", "raw"),
        disk("o.qcow2"),
        watched="x.raw",
    ),
    "on QEMU's command line": Case(
        f"{QCOW2} x.qcow2 1M", disk("x.qcow2"), disk("y.qcow2", "raw"), IN_ARGV.format(f"{IMAGES}/x.qcow2")
    ),
    "a directory that is shared with a guest": Case(
        f"{QCOW2} x.qcow2 1M",
        disk("x.qcow2"),
        f"<filesystem type='mount'><source dir='{IMAGES}'/><target dir='t'/></filesystem>",
    ),
    "a serial port's file": Case(
        "truncate -s 1M x.raw",
        disk("x.raw", "raw"),
        f"<serial type='file'><source path='{IMAGES}/x.raw'/><target port='0'/></serial>",
        watched="x.raw",
    ),
    "a chain that breaks": Case(
        f"{QCOW2} gone.qcow2 1M; {QCOW2} -b gone.qcow2 -F qcow2 o.qcow2; rm gone.qcow2; {QCOW2} x.qcow2 1M",
        disk("x.qcow2"),
        disk("o.qcow2"),
        words="is not known",
    ),
    "a volume that is nowhere": Case(
        f"{QCOW2} x.qcow2 1M", disk("x.qcow2"), volume("x.qcow2").replace("'default'", "'lost'"), words="is not known"
    ),
    "an image of nobody's that rests on it": Case(
        f"{QCOW2} x.qcow2 1M; {QCOW2} -b x.qcow2 -F qcow2 template.qcow2",
        disk("x.qcow2"),
        words="the image",
    ),
    "a raw disk with a forged header": Case(
        f"{QCOW2} x.qcow2 1M; {QCOW2} -u -b $PWD/x.qcow2 -F qcow2 evil.raw 1M",
        disk("x.qcow2"),
        disk("evil.raw", "raw"),
        stays=False,
    ),
}


@pytest.fixture
def source(lab: Lab) -> Iterator[Vm]:
    yield lab.vm("kc-a", "used", ["raw:4M:1M"], boot=False)
    wipe(lab)


@pytest.mark.parametrize("what", CASES)
def test_what_others_use_stays(lab: Lab, source: Vm, what: str) -> None:
    case = CASES[what]
    lab.run("kc-b", "sh", "-e", "-c", f"cd {IMAGES}; {case.make}")
    lab.run("kc-b", "virsh", "pool-refresh", "default")
    define(lab, "used", case.replaced)
    if case.other:
        define(lab, "other", case.other, case.more)
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "used", "--force")
    assert done.code == 0, done.err
    assert lab.outside("kc-b", f"{IMAGES}/{case.watched}").exists() is case.stays
    if case.stays:
        assert case.words in done.err
    assert_equal(lab, source)


def test_uefi_variables_of_another_vm_stay(lab: Lab, source: Vm) -> None:
    """libvirt would remove the file that the replaced VM's definition names, whoever else has it."""
    own, shared = f"{IMAGES}/own_VARS.fd", f"{IMAGES}/shared_VARS.fd"
    lab.run("kc-b", "sh", "-c", f"truncate -s 128K {own} {shared}; truncate -s 512K {IMAGES}/code.fd")
    for name in ("used", "other"):
        define_uefi(lab, name, shared)
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "used", "--cleanup-existing")
    assert done.code == 0, done.err
    assert f"{shared} was left: VM other uses it" in done.err
    assert lab.outside("kc-b", shared).exists()
    define_uefi(lab, "used", own)
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "used", "--cleanup-existing").code == 0
    assert not lab.outside("kc-b", own).exists()


def define_uefi(lab: Lab, name: str, variables: str) -> None:
    lab.run("kc-b", "virsh", "undefine", name, check=False)
    xml = (
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><features><acpi/></features>"
        "<os><type arch='x86_64' machine='q35'>hvm</type>"
        f"<loader readonly='yes' type='pflash'>{IMAGES}/code.fd</loader><nvram>{variables}</nvram></os></domain>"
    )
    lab.run("kc-b", "virsh", "define", "/dev/stdin", input=xml)


def test_another_file_at_the_path_of_what_was_replaced_stays(lab: Lab, source: Vm) -> None:
    """It came there between a crash after the commit and the next run, which finds the old path in the definition."""
    lab.run("kc-b", "sh", "-c", f"{QCOW2} {IMAGES}/x.qcow2 1M")
    define(lab, "used", disk("x.qcow2"))
    with held(lab, "committed", "kc-a", "kc-b", "used", "--force") as child:
        child.kill()
    other = lab.outside("kc-b", f"{IMAGES}/x.qcow2")
    other.unlink()
    other.write_text("precious")  # perhaps with the old inode's number
    answers: list[Done] = []
    wait_until("the lock is free", lambda: _done(lab, answers))
    assert answers[-1].code == 0, answers[-1].err
    assert "it is another file" in answers[-1].err
    assert other.read_text() == "precious"


def _done(lab: Lab, answers: list[Done]) -> bool:
    answers.append(kvm_clone(lab, "clone", "kc-a", "kc-b", "used", "--idempotent"))
    return answers[-1].code != 8


@contextmanager
def made(lab: Lab, make: str, undo: str) -> Iterator[None]:
    """Something on the destination beside what is in the pool."""
    lab.run("kc-b", "sh", "-e", "-c", make)
    try:
        yield
    finally:
        lab.run("kc-b", "sh", "-c", undo)


ELSEWHERE = "/var/lib/libvirt/elsewhere"
OVERLAY = f"mount -t overlay overlay -o lowerdir={ELSEWHERE}/low,upperdir={IMAGES},workdir={ELSEWHERE}/work"


@dataclass(frozen=True)
class Beside:
    """Something beside the pool, how it is made and undone, and what the reason says."""

    make: str
    undo: str
    words: str


BESIDE = {
    "an image in a pool that is not active": Beside(
        f"mkdir {ELSEWHERE}; virsh pool-define-as asleep dir --target {ELSEWHERE}; "
        f"{QCOW2} -b {IMAGES}/x.qcow2 -F qcow2 {ELSEWHERE}/child.qcow2",
        f"virsh pool-undefine asleep; rm -r {ELSEWHERE}",
        "the image",
    ),
    "a link in the pool to an image elsewhere": Beside(
        f"mkdir {ELSEWHERE}; {QCOW2} -b {IMAGES}/x.qcow2 -F qcow2 {ELSEWHERE}/child.qcow2; "
        f"ln -s {ELSEWHERE}/child.qcow2 {IMAGES}/l",
        f"rm -r {ELSEWHERE} {IMAGES}/l",
        "the image",
    ),
    "the same file in another filesystem": Beside(
        f"mkdir -p {ELSEWHERE}/low {ELSEWHERE}/work {ELSEWHERE}/all; {OVERLAY} {ELSEWHERE}/all",
        f"umount {ELSEWHERE}/all; rm -r {ELSEWHERE}",
        "VM other uses it",
    ),
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_is_used_from_elsewhere_stays(lab: Lab, source: Vm, what: str) -> None:
    case = BESIDE[what]
    lab.run("kc-b", "sh", "-e", "-c", f"cd {IMAGES}; {QCOW2} x.qcow2 1M; {QCOW2} y.qcow2 1M")
    with made(lab, case.make, case.undo):
        define(lab, "used", disk("x.qcow2"))
        define(
            lab,
            "other",
            disk("x.qcow2").replace(IMAGES, f"{ELSEWHERE}/all") if "other" in case.words else disk("y.qcow2"),
        )
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "used", "--force")
        assert done.code == 0, done.err
        assert case.words in done.err
        assert lab.outside("kc-b", f"{IMAGES}/x.qcow2").exists()


@contextmanager
def held_open(lab: Lab, *argv: str) -> Iterator[None]:
    """A process on the destination that has something open."""
    there = subprocess.Popen(lab.ssh_argv("kc-b", " ".join(argv)), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert there.stdout is not None
    assert there.stdout.readline() == b"ready\n"
    try:
        yield
    finally:
        there.communicate(timeout=20)


def test_what_a_process_has_open_stays(lab: Lab, source: Vm) -> None:
    lab.run("kc-b", "sh", "-c", f"{QCOW2} {IMAGES}/x.qcow2 1M")
    define(lab, "used", disk("x.qcow2"))
    with held_open(lab, f"exec 5<{IMAGES}/x.qcow2; echo ready; read line"):
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "used", "--force")
        assert done.code == 0, done.err
        assert "process" in done.err
        assert lab.outside("kc-b", f"{IMAGES}/x.qcow2").exists()


def test_a_sync_does_not_write_into_what_others_use(lab: Lab, source: Vm) -> None:
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "used").code == 0
    lab.run("kc-b", "sh", "-c", f"cd {IMAGES}; {QCOW2} -b used-vda.raw -F raw child.qcow2")
    lab.run("kc-b", "virsh", "pool-refresh", "default")
    define(lab, "other", volume("child.qcow2"))
    before = lab.outside("kc-b", f"{IMAGES}/used-vda.raw").read_bytes()
    with lab.outside("kc-a", source.disks["vda"]).open("r+b") as file:
        file.write(b"changed")
    done = kvm_clone(lab, "sync", "kc-a", "kc-b", "used")
    assert done.code == 3, done.err
    assert "VM other uses it" in done.err
    assert lab.outside("kc-b", f"{IMAGES}/used-vda.raw").read_bytes() == before


def test_domains_that_come_and_go_are_passed_over(lab: Lab, source: Vm) -> None:
    """And none of their files is taken for unused for it."""
    lab.run("kc-b", "sh", "-c", f"{QCOW2} {IMAGES}/x.qcow2 1M")
    define(lab, "used", disk("x.qcow2"))
    one = "<domain type='qemu'><name>flicker</name><memory>65536</memory><os><type>hvm</type></os><devices>"
    (lab.outside("kc-b", "/root") / "flicker.xml").write_text(f"{one}{disk('x.qcow2')}</devices></domain>")
    churn = "echo ready; while ! read -t 0 line; do virsh define /root/flicker.xml; virsh undefine flicker; done >&2"
    with held_open(lab, f"bash -c '{churn}' 2>/dev/null"):
        done = kvm_clone(lab, "clone", "kc-a", "kc-b", "used", "--new-name", "used-2")
    assert done.code == 0, done.err
