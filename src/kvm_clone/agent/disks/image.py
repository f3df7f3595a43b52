"""Opening image files by format: the one place that knows which kind of Disk serves which format and use."""

from __future__ import annotations

import os
from typing import Dict, Iterator, Optional, Sequence

from kvm_clone.agent.disks import chain, header, nbd, qemu
from kvm_clone.agent.disks.disk import Disk, Extent, Ranges, bounded, intersect, open_flags
from kvm_clone.agent.disks.file import FileDisk
from kvm_clone.agent.disks.nbd import NbdDisk
from kvm_clone.agent.protocol.errors import UNSUPPORTED, AgentError
from kvm_clone.agent.protocol.stream import Incoming
from kvm_clone.agent.protocol.wire import CHUNK

RAW, QCOW2 = chain.RAW, chain.QCOW2
NBD = "nbd"
"""What a running VM's backup job offers: the path is an NBD URI then."""


class MappedDisk(Disk):
    """An image file that nobody writes, read where `qemu-img map` says that the guest's bytes lie.

    They may lie in the images that it rests on. What lies elsewhere (compressed clusters) is read through qemu-nbd,
    started when first needed. Whoever opens one holds the image's lock.
    """

    def __init__(self, path: str, format_: str) -> None:
        self._path = path
        self._nbd: Optional[NbdDisk] = None
        self._layers = chain.linear(path, format_)
        about = qemu.info(path, format_)
        self._files: Dict[int, FileDisk] = {}
        self.size = int(about["virtual-size"])
        self._keeps_compression = _are_alike(self._layers)

    def extents(self, start: int = 0, end: Optional[int] = None) -> Iterator[Extent]:
        """See Disk."""
        start, stop = bounded(self, start, end)
        if start == stop:
            return
        for extent in qemu.map_extents(self._layers, start, stop):
            if extent.end > start and extent.offset < stop:
                compressed = extent.compressed and self._keeps_compression
                yield extent.cut(start, stop)._replace(compressed=compressed)

    def within(self, ranges: Ranges) -> Iterator[Extent]:
        """See Disk. One map serves every range: each costs a process."""
        return intersect(self.extents(ranges[0][0], ranges[-1][1]), ranges) if ranges else iter(())

    def _file(self, layer: int) -> FileDisk:
        if layer not in self._files:
            self._files[layer] = FileDisk(self._layers[layer].path)
        return self._files[layer]

    def _server(self) -> NbdDisk:
        if self._nbd is None:
            self._nbd = qemu.open_nbd(self._layers, writable=False)
        return self._nbd

    def readinto(self, offset: int, view: memoryview) -> None:
        """See Disk."""
        self._server().readinto(offset, view)

    def read_extent(self, extent: Extent, view: memoryview) -> None:
        """See Disk."""
        if extent.host is None:
            self.readinto(extent.offset, view)
        else:
            self._file(extent.layer).readinto(extent.host, view)

    def begin(self, extent: Extent) -> None:
        """See Disk."""
        if extent.host is None:
            self._server().begin(extent)

    def content(self, extent: Extent) -> memoryview:
        """See Disk."""
        return super().content(extent) if extent.host is not None else self._server().content(extent)

    def send(self, extent: Extent, out: int) -> None:
        """See Disk."""
        if extent.host is None:
            super().send(extent, out)
        else:
            self._file(extent.layer).send(extent, out)

    def write(self, offset: int, data: memoryview) -> None:
        """Raises AgentError: this kind is for reading."""
        raise AgentError(
            UNSUPPORTED, f"{self._path} is open for reading, not for writing {len(data)} bytes at {offset}"
        )

    def zero(self, offset: int, length: int) -> None:
        """Raises AgentError: this kind is for reading."""
        raise AgentError(UNSUPPORTED, f"{self._path} is open for reading, not for zeroing {length} bytes at {offset}")

    def flush(self) -> None:
        """See Disk."""

    def close(self) -> None:
        """See Disk."""
        for file in self._files.values():
            file.close()
        if self._nbd is not None:
            self._nbd.close()


def _are_alike(layers: Sequence[chain.Node]) -> bool:
    """Whether every compressed cluster of these layers can be a compressed cluster of one image of the top's kind.

    It has to be written by one request, and a request carries a chunk at most; QEMU's compress filter wants whole
    clusters, a last one too. A layer with other clusters than the top's, or an upper one with subclusters, may leave a
    part of one to be seen.
    """
    headers = [header.read(layer.path) for layer in layers if layer.format == QCOW2]
    cluster = headers[0].cluster
    split = len(headers) > 1 and any(one.subclusters for one in headers)
    return cluster <= CHUNK and not split and all((one.cluster, one.size % cluster) == (cluster, 0) for one in headers)


class StagedImage(Disk):
    """A qcow2 image that is being filled through qemu-nbd.

    Compressed clusters can only be written through QEMU's compress filter, and the filter compresses everything: the
    image is opened anew when the kind of data changes. A sender that sends compressed ranges first makes that once.
    """

    def __init__(self, path: str) -> None:
        self._layers = chain.linear(path, QCOW2)
        self._compress = False
        self._nbd = qemu.open_nbd(self._layers, writable=True)
        self.size = self._nbd.size

    def compress(self, wanted: bool) -> None:
        """Whether what is written from here on is stored compressed; such ranges must not have been written before."""
        if wanted != self._compress:
            self.flush()
            self._nbd.close()
            self._nbd = qemu.open_nbd(self._layers, writable=True, compress=wanted)
            self._compress = wanted

    def extents(self, start: int = 0, end: Optional[int] = None) -> Iterator[Extent]:
        """See Disk."""
        return self._nbd.extents(start, end)

    def within(self, ranges: Ranges) -> Iterator[Extent]:
        """See Disk."""
        return self._nbd.within(ranges)

    def readinto(self, offset: int, view: memoryview) -> None:
        """See Disk."""
        self._nbd.readinto(offset, view)

    def write(self, offset: int, data: memoryview) -> None:
        """See Disk."""
        self._nbd.write(offset, data)

    def receive(self, offset: int, length: int, source: Incoming) -> None:
        """See Disk."""
        self._nbd.receive(offset, length, source)

    def zero(self, offset: int, length: int) -> None:
        """See Disk."""
        self._nbd.zero(offset, length)

    def flush(self) -> None:
        """See Disk."""
        self._nbd.flush()

    def close(self) -> None:
        """See Disk."""
        self._nbd.close()


def open_for_reading(path: str, format_: str) -> Disk:
    """An image that nobody writes, or an export of NBD. Raises AgentError for a format that is not handled, OSError."""
    if format_ == NBD:
        return nbd.connect(path)
    if format_ == RAW:
        return FileDisk(path)
    if format_ == QCOW2:
        return MappedDisk(path, format_)
    raise AgentError(UNSUPPORTED, f"{path} has the format {format_}, which is not handled")


def open_for_filling(path: str, format_: str) -> Disk:
    """A staged image that is to be written. Raises AgentError for a format that is not handled, OSError."""
    if format_ == RAW:
        return FileDisk(path, writable=True)
    if format_ == QCOW2:
        return StagedImage(path)
    raise AgentError(UNSUPPORTED, f"{path} has the format {format_}, which is not handled")


def flush_and_drop_cache(path: str) -> None:
    """Make the file durable and forget its cached pages, so that what is read next comes from storage."""
    fd = os.open(path, open_flags(writable=False))
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
