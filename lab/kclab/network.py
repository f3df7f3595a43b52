"""The lab's network: one switch, a cable from it to every host and one to this machine.

The switch is a bridge in a namespace of its own, where this machine's firewall (which would see the
traffic of a bridge of its own through br_netfilter) does not reach.
"""

from __future__ import annotations

from kclab.command import LabError, kill, run
from kclab.state import Host, Lab


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
    _ip(switch(host.lab), f"link set {host.port} up")


def link(host: Host) -> str:
    """Tell the state of the link: `up`, `cut` or `none`, and whether it is shaped."""
    shown = run("ip", "-netns", switch(host.lab), "-oneline", "link", "show", host.port, check=False)
    if shown.returncode != 0:
        return "none"
    flags = shown.stdout.split("<")[1].split(">")[0].split(",")
    shaped = ", shaped" if "qdisc tbf" in shown.stdout or "qdisc netem" in shown.stdout else ""
    return ("up" if "UP" in flags else "cut") + shaped


def shape(host: Host, rate: str | None, delay: str | None) -> None:
    """Limit the link's rate and add a delay, in each of the two directions."""
    clear_shape(host)
    for end in _ends(host):
        if delay:
            _netem(end, delay)
        if rate:
            # 1 ms of traffic at 10 Gbit/s: a smaller bucket would limit fast rates further.
            parent = ["parent", "1:1"] if delay else ["root"]
            limits = f"tbf rate {rate} burst 1280kb latency 50ms".split()
            _tc("add", *end, *parent, "handle", "2:", *limits)


def clear_shape(host: Host) -> None:
    """Remove rate limit and delay."""
    for end in _ends(host):
        if "noqueue" not in run("tc", *end[:2], "qdisc", "show", *end[2:]).stdout:
            _tc("delete", *end, "root")


def _netem(end: list[str], delay: str) -> None:
    try:
        # The default queue of 1000 packets would drop what a fast link holds during the delay.
        _tc("add", *end, "root", "handle", "1:", "netem", "delay", delay, "limit", "100000")
    except LabError as error:
        if "kind is unknown" in str(error):
            raise LabError("this kernel cannot delay packets (no sch_netem): use --rate alone") from error
        raise


def _ends(host: Host) -> list[list[str]]:
    """Both ends of the cable as tc arguments: each shapes what it sends."""
    return [["-netns", switch(host.lab), "dev", host.port], ["-netns", host.netns, "dev", "eth0"]]


def _tc(action: str, option: str, namespace: str, *argv: str) -> None:
    run("tc", option, namespace, "qdisc", action, *argv)


def _ip(namespace: str, words: str) -> None:
    run("ip", "-netns", namespace, *words.split())
