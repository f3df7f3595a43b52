"""Who the hosts are to SSH: keys, known hosts, and who may log in where."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kclab.command import PATH, run
from kclab.state import Host, Lab

SSHD_CONFIG = f"""\
Port 22
AddressFamily inet
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /root/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
PrintLastLog no
PermitUserEnvironment no
SetEnv PATH={PATH}
AllowTcpForwarding yes
AllowStreamLocalForwarding yes
MaxSessions 20
MaxStartups 100
PidFile none
Subsystem sftp internal-sftp
"""


def write(lab: Lab) -> None:
    """Write all SSH files of the lab and of its hosts; keys that exist are kept."""
    hosts = lab.hosts()
    make_key(lab.state / "id_ed25519", "lab")
    for host in hosts:
        make_key(host.root / "etc/ssh/ssh_host_ed25519_key", host.name)
        make_key(host.root / "root/.ssh/id_ed25519", f"root@{host.name}")
    keys = [lab.state / "id_ed25519.pub", *(host.root / "root/.ssh/id_ed25519.pub" for host in hosts)]
    authorized = "".join(key.read_text() for key in keys)
    known = "".join(_known_host(host) for host in hosts)
    penalties = "PerSourcePenalties no\n" if _ssh_version() >= (9, 8) else ""
    put(lab.state / "known_hosts", known)
    put(lab.ssh_config, "".join(_user_config(host) for host in hosts))
    for host in hosts:
        put(host.root / "etc/ssh/sshd_config", SSHD_CONFIG + penalties)
        put(host.root / "root/.ssh/authorized_keys", authorized)
        put(host.root / "root/.ssh/known_hosts", known)
        put(host.root / "root/.ssh/config", _host_config(hosts))


def _ssh_version() -> tuple[int, ...]:
    """Tell the version of OpenSSH; newer ones would ban an address whose connections died often."""
    found = re.search(r"OpenSSH_(\d+)\.(\d+)", run("ssh", "-V").stderr)
    return tuple(int(part) for part in found.groups()) if found else (0,)


def make_key(path: Path, comment: str) -> None:
    """Make a key pair, unless it exists."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path))


def put(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file in place: one that is bind-mounted into a running host must keep its inode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.chmod(path, mode)


def _known_host(host: Host) -> str:
    kind, key = (host.root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
    return f"{host.name},{host.address} {kind} {key}\n"


def _user_config(host: Host) -> str:
    """Write the part of the lab's ssh_config for one host; it depends on no file of the user."""
    state = str(host.lab.state).replace("%", "%%")
    return f"""\
Host {host.name} {host.address}
    HostName {host.address}
    User root
    IdentityFile "{state}/id_ed25519"
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile "{state}/known_hosts"
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes

"""


def _host_config(hosts: list[Host]) -> str:
    """Write the ssh_config of root on every host."""
    aliases = "".join(f"Host {host.name}\n    HostName {host.address}\n\n" for host in hosts)
    return aliases + "Host *\n    User root\n    StrictHostKeyChecking yes\n    BatchMode yes\n"
