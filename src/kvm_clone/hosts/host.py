"""One host: its connection, the control agent that runs there, and the way to its libvirt."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from kvm_clone.agent.protocol import errors as kinds
from kvm_clone.errors import ConnectError
from kvm_clone.gather import undisturbed
from kvm_clone.hosts import ssh
from kvm_clone.hosts.agent_client import AgentClient
from kvm_clone.hosts.agent_errors import AgentCallError
from kvm_clone.hosts.agent_link import AgentLink
from kvm_clone.hosts.ssh_connection import SshConnection


class Host:
    """A connected host. One SSH connection carries the control agent, the data streams and libvirt."""

    def __init__(self, address: ssh.Address, options: ssh.SshOptions, directory: Path, *, interactive: bool) -> None:
        self.address = address
        self.name = address.text
        self.ssh = SshConnection(address, options, directory, interactive=interactive)
        self.link = AgentLink(self.ssh)
        self.agent = AgentClient(self.link)

    async def connect(self) -> None:
        """Connect and start the control agent. Raises ConnectError and its kinds; RefusedError: see SshConnection."""
        self.link.begin(await self.ssh.open())

    async def close(self) -> None:
        """End the agent, and with it the connection."""
        await undisturbed(self._close())

    async def _close(self) -> None:
        await self.link.close()
        await self.ssh.close()

    async def libvirt_uri(self, *, fenced: bool = False) -> str:
        """A URI by which libvirt on this machine reaches the host's, through the agent.

        `fenced`: it carries requests only while the agent holds an operation's lock, and ends with that. Raises
        ConnectError when the host's libvirt does not listen, TransferError.
        """
        try:
            channel = await self.agent.relay(fenced=fenced)
        except AgentCallError as error:
            if error.kind != kinds.MISSING:
                raise
            remedy = "start libvirtd (or virtqemud) there: systemctl start libvirtd"
            raise ConnectError(str(error), subject=self.name, remedy=remedy) from error
        tunnel = await self.link.open_tunnel(channel)
        return f"qemu+unix:///system?socket={quote(str(tunnel.path))}"
