"""Where a lab keeps its files, and every name and address that follows from that place.

Names derive from a hash of the state directory, so that the labs of two checkouts never meet:
network namespaces `kc1a2b3c-sw` (the switch) and `kc1a2b3c-a` (host kc-a), interface `kc1a2b3c`.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import json
import os
import string
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kclab.command import LabError, run

REPOSITORY = Path(__file__).resolve().parents[2]
HOST_NAMES = [f"kc-{letter}" for letter in string.ascii_lowercase[:20]]
SUBNET_CANDIDATES = 64


@dataclass(frozen=True)
class Host:
    """One machine of the lab: its names, addresses and files."""

    lab: Lab
    name: str

    @property
    def directory(self) -> Path:
        """All files of this host."""
        return self.lab.state / self.name

    @property
    def root(self) -> Path:
        """The files that are this host's own, under the paths where the host sees them."""
        return self.directory / "root"

    @property
    def pid_file(self) -> Path:
        """Process id and start time of the first process of the host's PID namespace."""
        return self.directory / "init.pid"

    @property
    def delay_pid_file(self) -> Path:
        """Process id and start time of the process that delays the host's link."""
        return self.directory / "delay.pid"

    @property
    def netns(self) -> str:
        """The host's network namespace."""
        return f"{self.lab.tag}-{self.name[len('kc-') :]}"

    @property
    def port(self) -> str:
        """The switch's end of the host's cable, inside the switch's namespace."""
        return self.name

    @property
    def tap(self) -> str:
        """What is at the bridge in place of the port while a process delays the host's link."""
        return f"{self.name}-delay"

    @property
    def address(self) -> str:
        """IPv4 address."""
        return str(self.lab.subnet()[10 + HOST_NAMES.index(self.name)])

    @property
    def mac(self) -> str:
        """The same at every power-on, so that the neighbours' ARP tables stay right."""
        digest = hashlib.sha256(f"{self.lab.tag} {self.name}".encode()).digest()
        return ":".join(f"{byte:02x}" for byte in b"\x02" + digest[:5])

    @property
    def uuid(self) -> uuid.UUID:
        """What libvirt reports as the host's UUID."""
        return self.lab.derived_uuid(self.name)


@dataclass(frozen=True)
class Lab:
    """One lab, known by its state directory."""

    state: Path

    @staticmethod
    def of_environment() -> Lab:
        """Return the lab of this repository, or the one KVM_CLONE_LAB_STATE names."""
        named = os.environ.get("KVM_CLONE_LAB_STATE")
        return Lab((Path(named) if named else REPOSITORY / ".lab").resolve())

    @property
    def digest(self) -> bytes:
        """Hash of the place; everything that must differ between labs comes from it."""
        return hashlib.sha256(str(self.state).encode()).digest()

    @property
    def tag(self) -> str:
        """Start of the lab's interface and namespace names: 8 characters of at most 15."""
        return "kc" + self.digest.hex()[:6]

    @property
    def cache(self) -> Path:
        """What outlives `down`: the guest image."""
        return self.state / "cache"

    @property
    def ssh_config(self) -> Path:
        """For `ssh -F`."""
        return self.state / "ssh_config"

    @property
    def gateway(self) -> str:
        """Address of this machine in the lab's network."""
        return str(self.subnet()[1])

    def derived_uuid(self, name: str) -> uuid.UUID:
        """Derive a UUID that is always the same for the lab and name."""
        return uuid.uuid5(uuid.NAMESPACE_URL, f"kvm-clone-lab:{self.state}:{name}")

    def hosts(self) -> list[Host]:
        """List the hosts that exist, powered or not."""
        return [Host(self, name) for name in HOST_NAMES if (self.state / name).is_dir()]

    def host(self, name: str) -> Host:
        """Return the host of the name."""
        if not (self.state / name).is_dir() or name not in HOST_NAMES:
            known = ", ".join(host.name for host in self.hosts())
            hint = f"there are {known}" if known else "run lab/lab up first"
            raise LabError(f"no host {name!r}: {hint}")
        return Host(self, name)

    def subnet(self) -> ipaddress.IPv4Network:
        """Read the lab's network, which the first `up` has chosen."""
        try:
            return ipaddress.IPv4Network(json.loads((self.state / "lab.json").read_text())["subnet"])
        except (OSError, ValueError, KeyError) as error:
            raise LabError("the lab has no network yet: run lab/lab up") from error

    def has_subnet(self) -> bool:
        """Tell whether the lab's network is chosen."""
        try:
            self.subnet()
        except LabError:
            return False
        return True

    def choose_subnet(self) -> None:
        """Take the first subnet of the hash's sequence that no route of this machine overlaps."""
        taken = list(_routed_networks())
        for number in range(SUBNET_CANDIDATES):
            digest = hashlib.sha256(self.digest + bytes([number])).digest()
            subnet = ipaddress.IPv4Network(f"10.{64 + digest[0] % 128}.{digest[1]}.0/24")
            if not any(subnet.overlaps(network) for network in taken):
                (self.state / "lab.json").write_text(json.dumps({"subnet": str(subnet)}) + "\n")
                return
        raise LabError("no free subnet in 10.64.0.0/9: this machine has routes to all that were tried")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one command at a time change the lab."""
        self.cache.mkdir(parents=True, exist_ok=True)
        with (self.cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _routed_networks() -> Iterator[ipaddress.IPv4Network]:
    for route in json.loads(run("ip", "-4", "-json", "route", "show").stdout or "[]"):
        if route["dst"] != "default":
            yield ipaddress.IPv4Network(route["dst"], strict=False)
