"""assets.py: a kind of asset that is no disk goes through steps and content like any other."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from cases import IMAGES, Case

from kvm_clone.agent.digests.digest import BLOCK
from kvm_clone.agent.digests.hashing import SIZE
from kvm_clone.agent.staging import records
from kvm_clone.errors import RefusedError
from kvm_clone.hosts.agent_client import AgentClient
from kvm_clone.hosts.host import Host
from kvm_clone.image import Image
from kvm_clone.options import Route, TransferOptions, Verify
from kvm_clone.planning.assets import Asset, Place
from kvm_clone.planning.facts import StagedDisk
from kvm_clone.planning.steps import CopyDisks, CreateDisk, ProveDisks, PublishDisk, Step
from kvm_clone.progress import DiskProgress, Event
from kvm_clone.transfer.content import Content

SOURCE = Image("/var/lib/libvirt/qemu/nvram/web_VARS.fd", "raw")
VAULT = Place("vault", "web", store="memory")
SAME, OTHER = bytes(SIZE), bytes([1]) * SIZE


@dataclass(frozen=True)
class Variables:
    """UEFI variables: an asset in a store that is no directory. `base`: an older state there."""

    key: str = "nvram"
    source: Image = SOURCE
    size: int = 2 * BLOCK
    data: int = 2 * BLOCK
    fingerprint: str = "1:2"
    place: Place = VAULT
    base: Image | None = None
    below: Image | None = None
    fine: bool = False
    staged: StagedDisk | None = None

    @property
    def spec(self) -> dict[str, Any]:
        return {"format": "raw", "size": self.size}

    def at(self, path: str) -> Image:
        return Image(path, "raw", below=self.below)


@dataclass
class Agent:
    """A host's agent whose image has these digests, one for each block, by the image's path."""

    digests: dict[str, list[bytes]]
    free: int = 0
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    name: str = "kc-b"

    @property
    def agent(self) -> AgentClient:
        return AgentClient(self)

    async def call(self, call: str, progress: Callable[[dict[str, Any]], None] | None = None, /, **given: Any) -> Any:
        if call == "note":
            self.notes.append((given["record"], given["fields"]))
            return None
        if call == "free":
            self.asked.append(("free", given["path"]))
            return self.free
        if call == "digests":
            return ["sha256"]
        if call == "data_in":
            return sum(end - start for start, end in given["ranges"])
        self.asked.append((given["path"], given["image_format"]))
        joined = base64.b64encode(b"".join(self.digests[given["path"]])).decode()
        return [[0, joined]]


VARIABLES = Variables()
PART = "memory:web.part"


def content(source: Agent, destination: Agent, heard: list[Event]) -> Content:
    moving = TransferOptions(route=Route.RELAY, parallel=1)
    return Content(cast(Host, source), cast(Host, destination), "web", moving, heard.append)


def test_another_kind_of_asset_is_proven_like_a_disk() -> None:
    here, there, heard = Agent({VARIABLES.source.path: [SAME, SAME]}), Agent({PART: [SAME, SAME]}), list[Event]()
    asset: Asset = VARIABLES
    moving = content(here, there, heard)
    asyncio.run(moving.prove([(asset, PART)], Verify.FULL))
    assert there.notes == [(records.PROVEN, {"disk": "nvram"})]
    assert (here.asked, there.asked) == ([(VARIABLES.source.path, "raw")], [(PART, "raw")])
    assert {event.disk for event in heard if isinstance(event, DiskProgress)} == {"nvram"}
    assert moving.totals.proof is Verify.FULL


def test_room_is_asked_for_where_the_asset_lands() -> None:
    older = Variables(base=Image("memory:web", "raw"))
    here, there = Agent({VARIABLES.source.path: [SAME, SAME]}), Agent({PART: [SAME, OTHER]}, free=BLOCK)
    with pytest.raises(RefusedError, match=r"^vault on kc-b has 64\.0 KiB free"):
        asyncio.run(content(here, there, []).copy([(older, PART)]))
    assert there.asked[-1] == ("free", "vault")


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (CreateDisk(VARIABLES), "make the staged image of nvram (raw)"),
        (CopyDisks((VARIABLES,)), "send the content of nvram"),
        (ProveDisks((VARIABLES,), Verify.SENT), "digest what was sent of nvram and compare"),
        (PublishDisk(VARIABLES), "give nvram its final name, vault/web"),
    ],
)
def test_steps_name_an_asset_by_its_key(step: Step, text: str) -> None:
    assert step.describe() == text


def test_a_planned_disk_is_an_asset() -> None:
    (disk,) = Case().plan().disks
    asset: Asset = disk
    assert (asset.key, asset.place, asset.source) == ("vda", Place(IMAGES, "web.qcow2"), disk.image)
    assert asset.at(disk.final) == Image(f"{IMAGES}/web.qcow2", "qcow2")
    assert (asset.spec["backing"], asset.spec["copy_of"]) == (None, None)


@pytest.mark.parametrize("path", ["/a", "/a/b.qcow2", "/a b/c'd.img", "/a/.b"])
def test_the_place_of_a_file_has_its_path(path: str) -> None:
    assert Place.of_file(path).path == path
    assert Place.of_file(path).beside("x").container == Place.of_file(path).container
