"""What a definition refers to on its host: clones that start beside their source, and new generations."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from clonekit import IMAGES, definition, kvm_clone, picture, remove
from labclient import Lab

pytestmark = pytest.mark.e2e

LOGS = "/var/log/libvirt/qemu"
GENID = "43dc0cf8-809b-4adb-9bea-a9abb5f3d90e"

OUTPUTS = f"""<serial type='file'><source path='{LOGS}/shared.log'/><target port='0'/></serial>
<serial type='pty'><log file='{LOGS}/original-port.log'/><target port='1'/></serial>
<channel type='unix'><source mode='bind' path='/run/original.sock'/><target type='virtio' name='org.example'/></channel>
<graphics type='vnc' socket='/run/vnc.sock'/>"""


@pytest.fixture(autouse=True)
def clean(lab: Lab) -> Iterator[None]:
    before = {host: picture(lab, host) for host in ("kc-a", "kc-b")}
    yield
    for host, then in before.items():
        names = set(lab.run(host, "virsh", "list", "--all", "--name").stdout.split("\n"))
        remove(lab, host, *(name for name in names if name and name not in then.domains.split()))


def define(lab: Lab, name: str, devices: str = "", top: str = "", cpu: str = "") -> None:
    lab.run("kc-a", "truncate", "-s", "1M", f"{IMAGES}/{name}.raw")
    lab.run("kc-a", "virsh", "pool-refresh", "default")  # its removal goes by volumes
    xml = f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>96</memory><vcpu>1</vcpu>{top}
<os><type arch='x86_64' machine='pc'>hvm</type></os>{cpu}<devices><disk type='file' device='disk'>
<driver name='qemu' type='raw'/><source file='{IMAGES}/{name}.raw'/><target dev='vda' bus='virtio'/></disk>
{devices}</devices></domain>"""
    lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml)


def made(lab: Lab, host: str, name: str) -> list[str]:
    """The paths of logs and sockets in the definition."""
    xml = lab.run(host, "virsh", "dumpxml", "--inactive", name).stdout
    return sorted(set(re.findall(r"(?:path|file|socket)='(/(?:var/log|run)/[^']*)'", xml)))


def test_a_clone_on_one_host_starts_beside_its_source(lab: Lab) -> None:
    define(lab, "original", OUTPUTS)
    done = kvm_clone(lab, "clone", "kc-a", "kc-a", "original", "--new-name", "second", "--output", "json")
    assert done.code == 0, done.err
    renamed = [one["subject"] for one in done.document["findings"] if one["code"] == "path-renamed"]
    assert sorted(renamed) == made(lab, "kc-a", "original")
    assert made(lab, "kc-a", "second") == [
        "/run/second.sock",
        "/run/vnc-second.sock",
        f"{LOGS}/second-port.log",
        f"{LOGS}/shared-second.log",
    ]
    for name in ("original", "second"):
        lab.run("kc-a", "virsh", "start", name)
    third = kvm_clone(lab, "clone", "kc-a", "kc-a", "original", "--new-name", "third")
    assert third.code == 0, third.err
    lab.run("kc-a", "virsh", "start", "third")


def test_a_clone_on_another_host_keeps_its_paths(lab: Lab) -> None:
    define(lab, "original", OUTPUTS)
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "original", "--new-name", "second")
    assert done.code == 0, done.err
    assert made(lab, "kc-b", "second") == made(lab, "kc-a", "original")
    again = kvm_clone(lab, "clone", "kc-a", "kc-b", "original", "--new-name", "second", "--force")
    assert again.code == 0, again.err
    assert made(lab, "kc-b", "second") == made(lab, "kc-a", "original")


def test_the_generation_is_new_for_a_clone_and_at_each_sync(lab: Lab) -> None:
    define(lab, "generations", top=f"<genid>{GENID}</genid>")

    def generation(host: str) -> str:
        return definition(lab, host, "generations").findtext("genid") or ""

    seen = [generation("kc-a")]
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "generations", "--preserve-uuid").code == 0
    seen.append(generation("kc-b"))
    assert kvm_clone(lab, "sync", "kc-a", "kc-b", "generations").code == 0
    assert generation("kc-b") == seen[-1], "nothing had changed"
    lab.run("kc-a", "sh", "-c", f"echo changed | dd of={IMAGES}/generations.raw conv=notrunc status=none")
    done = kvm_clone(lab, "sync", "kc-a", "kc-b", "generations")
    assert done.code == 0, done.err
    seen.append(generation("kc-b"))
    assert seen[0] == GENID
    assert len(set(seen)) == 3
    assert generation("kc-a") == GENID


@pytest.mark.parametrize(
    "cpu",
    [
        "check='partial'><model fallback='forbid'>Westmere-IBRS</model><feature policy='disable' name='spec-ctrl'/>",
        "check='none'><model fallback='allow'>Westmere-IBRS</model>",
        "check='none'><model fallback='forbid'>EPYC-Milan</model>",
    ],
)
def test_a_cpu_that_the_host_can_give_as_it_is_asked_for(lab: Lab, cpu: str) -> None:
    define(lab, "processor", cpu=f"<cpu mode='custom' match='exact' {cpu}</cpu>")
    done = kvm_clone(lab, "clone", "kc-a", "kc-b", "processor")
    assert done.code == 0, done.err
    lab.run("kc-b", "virsh", "start", "processor")


def test_a_sync_that_the_destination_would_refuse_touches_nothing(lab: Lab) -> None:
    modules = "/usr/lib/x86_64-linux-gnu/qemu"
    define(lab, "shown")
    assert kvm_clone(lab, "clone", "kc-a", "kc-b", "shown").code == 0
    xml = lab.run("kc-a", "virsh", "dumpxml", "--inactive", "shown").stdout
    video = "<graphics type='vnc' port='-1'/><video><model type='virtio'/></video></devices>"
    lab.run("kc-a", "virsh", "define", "/dev/stdin", input=xml.replace("</devices>", video))
    lab.run("kc-b", "sh", "-c", f"mkdir -p /run/modules && cp {modules}/accel-*.so /run/modules/ && touch /run/modules")
    lab.run("kc-b", "mount", "--bind", "/run/modules", modules)
    try:
        lab.run("kc-b", "virsh", "start", "shown")
        before = picture(lab, "kc-b")
        done = kvm_clone(lab, "sync", "kc-a", "kc-b", "shown", "--force")
        assert done.code == 3, done.err
        assert "does not support video model" in done.err
        assert picture(lab, "kc-b") == before
        assert lab.run("kc-b", "virsh", "domstate", "shown").stdout.strip() == "running"
    finally:
        lab.run("kc-b", "virsh", "destroy", "shown")  # its QEMU has modules open
        lab.run("kc-b", "umount", modules)
