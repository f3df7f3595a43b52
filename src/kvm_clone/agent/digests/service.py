"""The digests of an image as the controller asks for them: segments first, then the blocks of those that differ."""

from __future__ import annotations

import base64
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

from kvm_clone.agent.digests import digest
from kvm_clone.agent.digests.hashing import How
from kvm_clone.agent.disks import image
from kvm_clone.agent.disks.disk import Ranges
from kvm_clone.agent.protocol.errors import PROTOCOL, AgentError, from_exception
from kvm_clone.agent.protocol.wire import ProtocolError

Progress = Callable[[Dict[str, Any]], None]

REMEMBERED = 1024
"""Segments whose blocks' digests are kept, 16 KiB each: so many may be asked for without reading them again."""

_Parts = Tuple[Tuple[int, int], ...]

_How = Tuple[str, str]
"""hashing.How in JSON: the method's name, and the key in hexadecimal."""


class DigestService:
    """Digests images, and remembers the blocks of the segments that it digested last."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[Tuple[str, _How, _Parts], bytes] = OrderedDict()

    def segments(
        self, path: str, image_format: str, how: Sequence[str], ranges: Ranges, progress: Progress
    ) -> List[List[Any]]:
        """What was asked for of each segment, as [first byte, digest in hexadecimal].

        `how`: the function's name and its key in hexadecimal. `ranges`: see digest.segments. `progress` hears how many
        bytes are done.
        """
        answer: List[List[Any]] = []
        done = 0
        for segment in self._digest(path, image_format, _how(how), ranges):
            answer.append([segment.offset, segment.digest.hex()])
            done += segment.length
            progress({"done": done})
        return answer

    def blocks(self, path: str, image_format: str, how: Sequence[str], ranges: Ranges) -> List[List[Any]]:
        """The same by blocks, as [first byte, the blocks' digests joined, in base64]; the ranges touch few segments."""
        wanted = {at: (path, _how(how), parts) for at, parts in _by_segment(ranges).items()}
        # Looked up once: another call may make room for its own meanwhile.
        held = {at: self._blocks.get(key) for at, key in wanted.items()}
        missing = [part for at, blocks in held.items() if blocks is None for part in wanted[at][-1]]
        answer = {at: blocks for at, blocks in held.items() if blocks is not None}
        answer.update({found.offset: found.blocks for found in self._digest(path, image_format, _how(how), missing)})
        return [[at, base64.b64encode(blocks).decode()] for at, blocks in sorted(answer.items())]

    def _digest(self, path: str, image_format: str, how: _How, ranges: Ranges) -> Iterator[digest.Segment]:
        if not ranges:
            return
        wanted = _by_segment(ranges)
        missing = sum(end - start for start, end in ranges)
        try:
            disk = image.open_for_reading(path, image_format)
            try:
                for segment in digest.segments(disk, How(how[0], bytes.fromhex(how[1])), ranges):
                    self._remember((path, how, wanted[segment.offset]), segment.blocks)
                    missing -= segment.length
                    yield segment
            finally:
                disk.close()
        except (OSError, ProtocolError) as error:
            raise from_exception(error, f"reading {path}") from error
        if missing:  # what no extent covers was not digested, and would count as equal
            raise AgentError(PROTOCOL, f"the extents of {path} leave out {missing} bytes")

    def _remember(self, key: Tuple[str, _How, _Parts], blocks: bytes) -> None:
        self._blocks[key] = blocks
        self._blocks.move_to_end(key)
        if len(self._blocks) > REMEMBERED:
            self._blocks.popitem(last=False)


def _how(answer: Sequence[str]) -> _How:
    method, key = answer
    return method, key


def _by_segment(ranges: Ranges) -> Dict[int, _Parts]:
    """The parts of the ranges that lie in each segment, by the segment's first byte."""
    found: Dict[int, List[Tuple[int, int]]] = {}
    for start, end in ranges:
        while start < end:
            segment = start - start % digest.SEGMENT
            stop = min(end, segment + digest.SEGMENT)
            found.setdefault(segment, []).append((start, stop))
            start = stop
    return {segment: tuple(parts) for segment, parts in found.items()}
