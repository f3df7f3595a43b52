"""A host: its configuration, power, and running commands on it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kclab import network
from kclab.command import LabError, environment, kill, run, running, wait_until
from kclab.identity import put
from kclab.state import Host, Lab

QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
namespaces = [ ]
cgroup_controllers = [ ]
"""
POOL = """\
<pool type="dir">
  <name>default</name>
  <uuid>{uuid}</uuid>
  <source/>
  <target><path>/var/lib/libvirt/images</path></target>
</pool>
"""
NETWORK = """\
<network>
  <name>default</name>
  <uuid>{uuid}</uuid>
  <forward mode="nat"/>
  <bridge name="virbr0" stp="off" delay="0"/>
  <ip address="192.168.122.1" netmask="255.255.255.0">
    <dhcp><range start="192.168.122.2" end="192.168.122.254"/></dhcp>
  </ip>
</network>
"""


def create(host: Host) -> None:
    """Make the files of a host that does not exist yet."""
    if host.root.exists():
        return
    for path in ("var/lib/libvirt/images", "var/log/libvirt/qemu", "var/cache/libvirt"):
        (host.root / path).mkdir(parents=True)
    for path in ("root/.ssh", "etc/ssh"):
        (host.root / path).mkdir(parents=True, mode=0o700)
    (host.root / "empty").touch()
    etc = host.root / "etc"
    put(etc / "hostname", f"{host.name}\n", 0o644)
    put(etc / "machine-id", f"{host.uuid.hex}\n", 0o644)
    # Not the machine's own: sshd without PAM refuses a root whose password is locked with "!".
    put(etc / "shadow", "root:*:19000:0:99999:7:::\n")
    put(etc / "libvirt/libvirtd.conf", f'host_uuid = "{host.uuid}"\nauth_unix_rw = "none"\n')
    put(etc / "libvirt/qemu.conf", QEMU_CONF)
    pool, net = (host.lab.derived_uuid(f"{host.name} {kind}") for kind in ("pool", "network"))
    _autostarted(etc / "libvirt/storage", POOL.format(uuid=pool))
    _autostarted(etc / "libvirt/qemu/networks", NETWORK.format(uuid=net))


def write_hosts_files(lab: Lab) -> None:
    """Let every host know the others by name."""
    names = "".join(f"{host.address} {host.name}\n" for host in lab.hosts())
    for host in lab.hosts():
        put(host.root / "etc/hosts", f"127.0.0.1 localhost\n{names}", 0o644)


def _autostarted(directory: Path, xml: str) -> None:
    put(directory / "default.xml", xml)
    (directory / "autostart").mkdir()
    here = "/" + str(directory).rpartition("/root/")[2]
    (directory / "autostart/default.xml").symlink_to(f"{here}/default.xml")


def init_pid(host: Host) -> int | None:
    """Return the first process of the host's PID namespace, or None when the host is off."""
    return running(host.pid_file)


def begin_start(host: Host) -> subprocess.Popen[bytes]:
    """Power the host on, without waiting for its daemons."""
    network.attach(host)
    host.pid_file.unlink(missing_ok=True)
    namespaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--propagation", "private"]
    init = ["python3", "-I", "-B", str(Path(__file__).with_name("init.py"))]
    with (host.directory / "init.log").open("wb") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", host.netns, *namespaces, *init, str(host.directory), host.name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment(),
        )


def finish_start(host: Host, started: subprocess.Popen[bytes]) -> None:
    """Wait until sshd and libvirt of the host answer."""
    asked = ("virsh", "-q", "-c", "qemu:///system", "pool-list --name; net-list --name")
    active: list[str] = []

    def libvirt_answers() -> bool:
        answer = run(*entered(host, *asked), check=False)
        active.extend(answer.stdout.split())
        return answer.returncode == 0

    _wait_for(host, started, "init", lambda: init_pid(host) is not None)
    _wait_for(host, started, "sshd", lambda: _listens_for_ssh(host))
    _wait_for(host, started, "libvirtd", libvirt_answers)
    log = host.directory / "libvirtd.log"
    if not active:
        raise LabError(f"{host.name} has no storage pool: see {log}")
    if active.count("default") == 1:
        print(f"lab: {host.name} goes on without the libvirt network 'default': see {log}", file=sys.stderr)


def _wait_for(host: Host, started: subprocess.Popen[bytes], program: str, answers: Callable[[], bool]) -> None:
    """Wait until a program of the host answers, or the host's first process has failed."""
    log = host.directory / f"{program}.log"
    wait_until(lambda: started.poll() is not None or answers(), f"{program} does not start: see {log}")
    if started.poll() is not None:
        raise LabError(f"{host.name} does not start: see {host.directory}/init.log")


def power_off(host: Host) -> None:
    """Cut the power: cable first, then every process at once; disks stay as they are."""
    network.pull_cable(host)
    pid = init_pid(host)
    if pid is not None:
        kill(pid)
        wait_until(lambda: init_pid(host) is None, f"process {pid} of {host.name} does not end")
    host.pid_file.unlink(missing_ok=True)
    network.detach(host)


def entered(host: Host, *argv: str) -> list[str]:
    """Return the command line that runs argv inside the host."""
    pid = init_pid(host)
    if pid is None:
        raise LabError(f"{host.name} is off: run lab/lab power on {host.name}")
    return ["nsenter", "--target", str(pid), "--mount", "--uts", "--net", "--pid", "--", *argv]


def _listens_for_ssh(host: Host) -> bool:
    try:
        socket.create_connection((host.address, 22), timeout=1).close()
    except OSError:
        return False
    return True
