"""Two (or more) libvirt hosts on this machine, each in its own namespaces, to try kvm-clone on.

Usage: lab/lab COMMAND …

  up [--hosts N]                  make the lab, or mend it: all hosts on, all links up and unshaped
  down                            end it; only the cached guest image stays
  status                          what there is
  exec HOST -- CMD…               run a command on a host
  vm HOST NAME [--disk FORMAT:SIZE[:DATA]]… [--no-boot-disk] [--guest MODE] [--guest-agent]
               [--uefi] [--pool] [--start] [--json]
                                  make and define a VM; one that has the name already is replaced
  power off|on HOST               cut the host's power (its disks stay), or switch it on
  net cut|heal HOST               take the host's link down, or up
  net shape HOST [--rate 1gbit] [--delay 25ms] | --clear
                                  limit and delay the link, in each direction: a round trip
                                  takes twice the delay longer

A guest prints `GUEST-UP` and the first line of vdb on its serial port. Then, by MODE:

  tick     (if none is given) writes a counter to vdb once a second
  counter  writes `count N` at 1 MiB of vdb, then of vdc, up to 50 times a second, each time after a
           block of 4 KiB to each; every write is on the disk before the next one
  fs       mounts vdb, which is made with ext4, and there makes, replaces and deletes files that
           begin with a line of CRC-32 and length; `last` has the number of the last finished round

The last two print `TICK SECONDS N` up to ten times a second, by the guest's clock, and go on where
they were when they boot again. With --guest-agent the VM has the QEMU guest agent and its channel. With --uefi
it boots by UEFI and prints `EFI-VARIABLE TEXT`, of a variable that it makes at its first start. With --pool
its definition names the disks by pool and volume.

Examples:
  lab/lab up
  lab/lab vm kc-a web --start
  lab/lab vm kc-a big --no-boot-disk --disk qcow2:4G:1.5G --disk raw:1G:200M
  lab/lab vm kc-a busy --guest fs --guest-agent --start
  lab/lab vm kc-a -- "-odd name's"
  lab/lab exec kc-a -- virsh list --all
  ssh -F .lab/ssh_config kc-b hostname
  kvm-clone clone kc-a kc-b web           (with --ssh-config .lab/ssh_config)
  lab/lab power off kc-b
  lab/lab net shape kc-b --rate 100mbit --delay 10ms
  lab/lab down

The hosts are kc-a, kc-b, …; the files of the lab are in .lab/, or where KVM_CLONE_LAB_STATE says.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from typing import NoReturn

from kclab import host, identity, network, vm
from kclab.command import LabError, environment, missing_programs
from kclab.disk import Disk
from kclab.extras import MODES, TICK, Extras
from kclab.state import HOST_NAMES, Host, Lab

PROGRAMS = (
    "ip",
    "unshare",
    "nsenter",
    "mount",
    "ssh-keygen",
    "sshd",
    "libvirtd",
    "virtlogd",
    "virsh",
    "qemu-img",
    "qemu-system-x86_64",
    "python3",
)
DEFAULT_HOSTS = 2


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise, where argparse would print its usage and exit."""
        raise LabError(f"{message} (see lab/lab --help)")


def up(lab: Lab, argv: list[str]) -> None:
    """`lab/lab up`."""
    parser = Parser("lab/lab up")
    parser.add_argument("--hosts", type=int, choices=range(1, len(HOST_NAMES) + 1), metavar="N")
    count = parser.parse_args(argv).hosts or max(DEFAULT_HOSTS, len(lab.hosts()))
    missing = missing_programs(PROGRAMS)
    if missing:
        raise LabError(f"missing: {', '.join(missing)}; run scripts/install lab")
    with lab.locked():
        if not lab.has_subnet():
            network.remove(lab)
            lab.choose_subnet()
        for name in HOST_NAMES[:count]:
            host.create(Host(lab, name))
        identity.write(lab)
        host.write_hosts_files(lab)
        network.ensure_switch(lab)
        _power_on([each for each in lab.hosts() if not _mend(each)])
    status(lab, [])


def _mend(each: Host) -> bool:
    """Restore the link of a host that is on; False when it must be started."""
    if host.init_pid(each) is None or network.link(each) == "none":
        host.power_off(each)
        return False
    network.heal(each)
    network.clear_shape(each)
    return True


def _power_on(hosts: list[Host]) -> None:
    started = [(each, host.begin_start(each)) for each in hosts]
    for each, process in started:
        host.finish_start(each, process)


def down(lab: Lab, argv: list[str]) -> None:
    """`lab/lab down`."""
    Parser("lab/lab down").parse_args(argv)
    if not lab.state.exists() and not network.namespaces(lab):
        return
    with lab.locked():
        for each in lab.hosts():
            host.power_off(each)
        network.remove(lab)
        for path in lab.state.iterdir():
            if path != lab.cache:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def status(lab: Lab, argv: list[str]) -> None:
    """`lab/lab status`."""
    Parser("lab/lab status").parse_args(argv)
    hosts = lab.hosts()
    if not hosts:
        print("down: no hosts; lab/lab up makes them")
        return
    for each in hosts:
        power = "on" if host.init_pid(each) else "off"
        print(f"{each.name}  {each.address}  power {power}  link {network.link(each)}")
    print(f"ssh -F {shlex.quote(os.path.relpath(lab.ssh_config))} {hosts[0].name}")


def execute(lab: Lab, argv: list[str]) -> NoReturn:
    """`lab/lab exec`; becomes the command, so that its streams and exit code are the user's."""
    if len(argv) < 3 or argv[1] != "--":
        raise LabError("usage: lab/lab exec HOST -- CMD…")
    command = host.entered(lab.host(argv[0]), *argv[2:])
    os.execvpe(command[0], command, environment())


def make_vm(lab: Lab, argv: list[str]) -> None:
    """`lab/lab vm`."""
    parser = Parser("lab/lab vm")
    parser.add_argument("host")
    parser.add_argument("name")
    parser.add_argument("--disk", action="append", type=Disk.parse)
    parser.add_argument("--no-boot-disk", dest="boot", action="store_false")
    parser.add_argument("--guest", default=TICK, choices=MODES)
    parser.add_argument("--guest-agent", action="store_true")
    parser.add_argument("--uefi", action="store_true")
    parser.add_argument("--pool", action="store_true")
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(argv)
    wanted = Extras(asked.guest, asked.guest_agent, asked.uefi, asked.pool)
    made = vm.make(lab.host(asked.host), asked.name, asked.disk or [], asked.boot, asked.start, wanted)
    print(json.dumps(made.fields()) if asked.json else made.report())


def power(lab: Lab, argv: list[str]) -> None:
    """`lab/lab power`."""
    parser = Parser("lab/lab power")
    parser.add_argument("state", choices=("off", "on"))
    parser.add_argument("host")
    asked = parser.parse_args(argv)
    each = lab.host(asked.host)
    with lab.locked():
        if asked.state == "off":
            host.power_off(each)
        elif host.init_pid(each) is None:
            network.ensure_switch(lab)
            _power_on([each])


def net(lab: Lab, argv: list[str]) -> None:
    """`lab/lab net`."""
    parser = Parser("lab/lab net")
    parser.add_argument("action", choices=("cut", "heal", "shape"))
    parser.add_argument("host")
    parser.add_argument("--rate")
    parser.add_argument("--delay")
    parser.add_argument("--clear", action="store_true")
    asked = parser.parse_args(argv)
    if (asked.action == "shape") != bool(asked.rate or asked.delay or asked.clear):
        raise LabError("only `net shape` takes --rate, --delay or --clear, and it needs one of them")
    each = lab.host(asked.host)
    if network.link(each) == "none":
        raise LabError(f"{each.name} is off: run lab/lab power on {each.name}")
    with lab.locked():
        if asked.action == "cut":
            network.cut(each)
        elif asked.action == "heal":
            network.heal(each)
        elif asked.clear:
            network.clear_shape(each)
        else:
            network.shape(each, asked.rate, asked.delay)


COMMANDS = {
    "up": up,
    "down": down,
    "status": status,
    "exec": execute,
    "vm": make_vm,
    "power": power,
    "net": net,
}


def main(argv: list[str]) -> int:
    """Run one command; errors are one line on standard error."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise LabError(f"no command {argv[0]!r}: there are {', '.join(COMMANDS)} (see lab/lab --help)")
        if os.geteuid() != 0:
            raise LabError("must run as root: it makes namespaces; try sudo lab/lab …")
        COMMANDS[argv[0]](Lab.of_environment(), argv[1:])
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
