"""Where bytes are, and how QEMU opens them: the one type for it, from the inspection to the agent."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Image:
    """A disk image. Which host has it is said by whoever holds it.

    `path`: a file's path, or an export's URI where the format is agent.disks.image.NBD. `format`: the driver that
    QEMU opens it with: it is always given, and never probed. `below`: the image that this one rests on, None where it
    rests on nothing or where that is not known.
    """

    path: str
    format: str
    below: Image | None = field(default=None, kw_only=True)

    @property
    def layers(self) -> tuple[Image, ...]:
        """The images that it rests on, the nearest first."""
        return (self.below, *self.below.layers) if self.below is not None else ()
