"""The lab's network: one switch, a cable from it to every host and one to this machine.

The switch is a bridge in a namespace of its own, where this machine's firewall (which would see the
traffic of a bridge of its own through br_netfilter) does not reach.

Where the kernel cannot delay packets, a process does (delay.py): its TAP interface is at the bridge in place
of the host's port, and it passes the frames between the two. The host sees nothing of it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from kclab.command import LabError, environment, kill, run, running, started_at, wait_until
from kclab.state import Host, Lab

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def switch(lab: Lab) -> str:
    """Name the namespace that holds the bridge."""
    return f"{lab.tag}-sw"


def namespaces(lab: Lab) -> list[str]:
    """List the network namespaces of the lab that exist, whoever left them."""
    names = [line.split()[0] for line in run("ip", "netns", "list").stdout.splitlines() if line.strip()]
    return [name for name in names if name.startswith(lab.tag + "-")]


def ensure_switch(lab: Lab) -> None:
    """Make the switch and its cable to this machine, unless they are there."""
    uplink = run("ip", "-4", "-oneline", "address", "show", "dev", lab.tag, check=False)
    bridge = run("ip", "-netns", switch(lab), "link", "show", "br0", check=False)
    if bridge.returncode == 0 and f" {lab.gateway}/" in uplink.stdout:
        return
    remove(lab)
    run("ip", "netns", "add", switch(lab))
    _ip(switch(lab), "link add br0 type bridge")
    _ip(switch(lab), "link set br0 up")
    run("ip", "link", "add", lab.tag, "type", "veth", "peer", "name", "uplink", "netns", switch(lab))
    _ip(switch(lab), "link set uplink master br0 up")
    run("ip", "address", "add", f"{lab.gateway}/{lab.subnet().prefixlen}", "dev", lab.tag)
    run("ip", "link", "set", lab.tag, "up")


def attach(host: Host) -> None:
    """Give the host a network namespace and a cable to the switch, both new."""
    detach(host)
    run("ip", "netns", "add", host.netns)
    peer = f"peer name {host.port} netns {switch(host.lab)}"
    _ip(host.netns, f"link add eth0 address {host.mac} type veth {peer}")
    _ip(switch(host.lab), f"link set {host.port} master br0 up")
    _ip(host.netns, f"address add {host.address}/{host.lab.subnet().prefixlen} dev eth0")
    _ip(host.netns, "link set lo up")
    _ip(host.netns, "link set eth0 up")


def pull_cable(host: Host) -> None:
    """Remove the cable, so that a dying host sends no farewell, which a power cut would not either."""
    _end_forwarder(host)
    run("ip", "-netns", switch(host.lab), "link", "delete", host.port, check=False)


def detach(host: Host) -> None:
    """Remove the host's cable and network namespace."""
    pull_cable(host)
    if host.netns in namespaces(host.lab):
        _delete(host.netns)


def remove(lab: Lab) -> None:
    """Remove the whole network."""
    run("ip", "link", "delete", lab.tag, check=False)
    for name in namespaces(lab):
        _delete(name)


def _delete(namespace: str) -> None:
    """Delete a namespace and end what runs in it: a host whose state directory was lost still does."""
    for pid in run("ip", "netns", "pids", namespace, check=False).stdout.split():
        kill(int(pid))
    run("ip", "netns", "delete", namespace)


def cut(host: Host) -> None:
    """Take the link down at the switch; the host stays on."""
    _ip(switch(host.lab), f"link set {host.port} down")


def heal(host: Host) -> None:
    """Take the link up again."""
    if running(host.delay_pid_file) is None:
        _ip(switch(host.lab), f"link set {host.port} master br0")
    _ip(switch(host.lab), f"link set {host.port} up")


def link(host: Host) -> str:
    """Tell the state of the link: `up`, `cut` or `none`, and whether it is shaped."""
    shown = run("ip", "-netns", switch(host.lab), "-oneline", "link", "show", host.port, check=False)
    if shown.returncode != 0:
        return "none"
    delayed = running(host.delay_pid_file) is not None
    # A port that its forwarder left without the bridge leads nowhere.
    joined = delayed or " master br0 " in shown.stdout
    flags = shown.stdout.split("<")[1].split(">")[0].split(",")
    shaped = delayed or "qdisc tbf" in shown.stdout or "qdisc netem" in shown.stdout
    return ("up" if joined and "UP" in flags else "cut") + (", shaped" if shaped else "")


def shape(host: Host, rate: str | None, delay: str | None) -> None:
    """Limit the link's rate and add a delay, in each of the two directions."""
    seconds = None if delay is None else parse_delay(delay)
    clear_shape(host)
    try:
        netem = delay is not None and all(_netem(end, delay) for end in _ends(host))
        for end in _ends(host) if rate else []:
            # 1 ms of traffic at 10 Gbit/s: a smaller bucket would limit fast rates further.
            parent = ["parent", "1:1"] if netem else ["root"]
            limits = f"tbf rate {rate} burst 1280kb latency 50ms".split()
            _tc("add", *end, *parent, "handle", "2:", *limits)
        if seconds is not None and not netem:
            _forward(host, seconds)
    except (LabError, OSError):
        clear_shape(host)
        raise


def clear_shape(host: Host) -> None:
    """Remove rate limit and delay."""
    _end_forwarder(host)
    _ip(switch(host.lab), f"link set {host.port} master br0")
    for end in _ends(host):
        if "noqueue" not in run("tc", *end[:2], "qdisc", "show", *end[2:]).stdout:
            _tc("delete", *end, "root")


def parse_delay(text: str) -> float:
    """Seconds from 25ms, 1.5s, 500us."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|ms|us)", text)
    if match is None:
        raise LabError(f"{text!r} is not a delay such as 25ms, 1.5s or 500us")
    return float(match[1]) * SECONDS[match[2]]


def _netem(end: list[str], delay: str) -> bool:
    """Delay what one end sends; False when the kernel has no netem."""
    try:
        # The default queue of 1000 packets would drop what a fast link holds during the delay.
        _tc("add", *end, "root", "handle", "1:", "netem", "delay", delay, "limit", "100000")
    except LabError as error:
        if "kind is unknown" in str(error):
            return False
        raise
    return True


def _forward(host: Host, seconds: float) -> None:
    """Put a process that delays every frame between the host's port and the bridge."""
    program = [str(Path(__file__).with_name("delay.py")), host.port, host.tap, str(seconds)]
    log = host.directory / "delay.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            ["ip", "netns", "exec", switch(host.lab), "python3", "-I", "-B", *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            env=environment(),
        )
    host.delay_pid_file.write_text(f"{process.pid} {started_at(process.pid)}\n")
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        if not process.stdout.readline():
            lines = log.read_text().strip().splitlines() or ["no reason given"]
            raise LabError(f"this kernel has no sch_netem, and delaying without it failed: {lines[-1]}")
        _ip(switch(host.lab), f"link set {host.port} nomaster")
        _ip(switch(host.lab), f"link set {host.tap} master br0 txqueuelen 10000 up")
        process.stdin.write(b"plugged in\n")


def _end_forwarder(host: Host) -> None:
    """End the process that delays the link; its interface goes with it."""
    pid = running(host.delay_pid_file)
    if pid is not None:
        kill(pid)
        wait_until(lambda: running(host.delay_pid_file) is None, f"process {pid} does not end")
    host.delay_pid_file.unlink(missing_ok=True)


def _ends(host: Host) -> list[list[str]]:
    """Both ends of the cable as tc arguments: each shapes what it sends."""
    return [["-netns", switch(host.lab), "dev", host.port], ["-netns", host.netns, "dev", "eth0"]]


def _tc(action: str, option: str, namespace: str, *argv: str) -> None:
    run("tc", option, namespace, "qdisc", action, *argv)


def _ip(namespace: str, words: str) -> None:
    run("ip", "-netns", namespace, *words.split())
