"""Which hosts, VMs and files are one, and what a retry may touch: tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cases import IMAGES, OTHER_HOST, REPLICA_IMAGE, SOURCE_HOST, Case, disk_xml, existing, options, replica, staged

from kvm_clone.errors import ExitCode
from kvm_clone.options import Retry
from kvm_clone.planning.consent import consent_of
from kvm_clone.planning.facts import Facts
from kvm_clone.planning.identity import HostIdentity, same_file, same_host, shared
from kvm_clone.planning.identity_checks import SAME_VM

HERE = HostIdentity("boot", "1:2:3", "machine", "uuid")

HOSTS = {
    "itself": (HERE, True),
    "another address, and a UUID that libvirt made up anew": (replace(HERE, uuid="temporary"), True),
    "a copied installation on hardware with the same UUID": (replace(HERE, boot="another"), False),
    "a container on the same kernel": (replace(HERE, libvirt="4:5:6"), False),
    "a container with a machine-id of its own": (replace(HERE, libvirt="4:5:6", machine="other"), False),
    "nothing known of the kernel": (replace(HERE, boot=""), True),
    "nothing known of the kernel, another machine-id": (replace(HERE, boot="", machine="other"), False),
    "nothing known of the kernel, another UUID": (replace(HERE, boot="", uuid="other"), False),
    "no socket of libvirt's to look at": (replace(HERE, libvirt=""), True),
    "no socket, another machine-id": (replace(HERE, libvirt="", machine="other"), False),
}


@pytest.mark.parametrize("what", HOSTS)
def test_one_host(what: str) -> None:
    other, expected = HOSTS[what]
    assert same_host(HERE, other) is same_host(other, HERE) is expected


FILES = {
    "itself": ("1:2:3:4:5", "1:2:3:4:5", True, True),
    "written meanwhile": ("1:2:3:4:5", "1:2:9:8:7", True, False),
    "another inode": ("1:2:3:4:5", "1:9:3:4:5", False, False),
    "the same inode of another device": ("1:2:3:4:5", "9:2:3:4:5", False, True),
    "the same inode of another host's device": ("1:2:3:4:5", "9:2:9:9:9", False, False),
    "one that is not there": ("1:2:3:4:5", "", False, False),
    "two that are not there": ("", "", False, False),
}


@pytest.mark.parametrize("what", FILES)
def test_one_file(what: str) -> None:
    one, other, here, elsewhere = FILES[what]
    assert (same_file(one, other, one_host=True), same_file(one, other, one_host=False)) == (here, elsewhere)


def test_shared_files_are_found_by_their_paths() -> None:
    ours, theirs = {"/a": "1:2:3:4:5", "/b": "1:6:3:4:5"}, {"/x": "7:2:3:4:5", "/y": "7:8:3:4:5"}
    assert shared(ours, theirs, one_host=False) == [("/a", "/x")]


RETRIES = list(Retry)
ONE_HOST: dict[str, Any] = {"destination_host": {"identity": SOURCE_HOST}}
SHARED = {f"{IMAGES}/web.qcow2": "1:2:3:4:5"}


def refused(case: Case) -> set[str]:
    plan = case.plan()
    refusal = plan.refusal()
    assert plan.steps == () or refusal is None
    return {finding.code for finding in plan.blocking}


@pytest.mark.parametrize("retry", RETRIES)
def test_a_clone_that_would_replace_its_source_is_refused_whatever_the_flag(retry: Retry) -> None:
    itself = Case(**ONE_HOST, existing=existing(), options=options(retry=retry))
    assert SAME_VM in refused(itself)
    refusal = itself.plan().refusal()
    assert refusal is not None
    assert refusal.exit_code is (ExitCode.EXISTS if retry is Retry.NONE else ExitCode.REFUSED)
    assert SAME_VM in {finding.code for finding in itself.sync(retry=retry).blocking}


def test_a_copy_on_the_same_host_under_another_name_is_a_copy() -> None:
    assert refused(Case(**ONE_HOST, options=options(new_name="web-2"))) == set()


@pytest.mark.parametrize("retry", RETRIES)
def test_a_vm_that_has_the_sources_own_disk_is_not_replaced(retry: Retry) -> None:
    both = replace(existing(), files={"/elsewhere/web.qcow2": "9:2:3:4:5"})
    case = Case(source={"files": SHARED}, existing=both, options=options(retry=retry))
    assert SAME_VM in refused(case)
    assert SAME_VM in {finding.code for finding in case.sync(retry=retry).blocking}
    apart = replace(existing(), files={"/elsewhere/web.qcow2": "9:2:3:4:6"})
    assert SAME_VM not in refused(replace(case, existing=apart))


def test_disks_that_are_one_file_under_two_names_are_refused() -> None:
    devices = disk_xml(f"{IMAGES}/web.qcow2") + disk_xml(f"{IMAGES}/link.qcow2", "vdb")
    files = {f"{IMAGES}/web.qcow2": "1:2:3:4:5", f"{IMAGES}/link.qcow2": "1:2:3:4:5"}
    assert "disk-duplicate" in refused(Case(devices, source={"files": files}))
    files[f"{IMAGES}/link.qcow2"] = "1:3:3:4:5"
    assert refused(Case(devices, source={"files": files})) == set()


def test_a_replica_whose_disks_are_one_file_is_not_written_into() -> None:
    facts = Case().facts()
    one = replace(REPLICA_IMAGE, target="vda")
    other = replace(REPLICA_IMAGE, target="vdb", path=f"{IMAGES}/link.qcow2")
    plan = Case(existing=replica(facts, one, other)).sync(retry=Retry.FORCE)
    assert "replica-duplicate" in {finding.code for finding in plan.blocking}
    apart = replica(facts, one, replace(other, fingerprint="1:9:3:4:5"))
    assert "replica-duplicate" not in {
        finding.code for finding in Case(existing=apart).sync(retry=Retry.FORCE).blocking
    }


def test_files_of_a_replaced_vm_that_stay_are_named_with_the_reason() -> None:
    there = existing(kept=((f"{IMAGES}/base.qcow2", "VM other uses it"),))
    plan = Case(existing=there, options=options(retry=Retry.FORCE)).plan()
    assert plan.refusal() is None
    (found,) = [finding for finding in plan.findings if finding.code == "file-kept"]
    assert "VM other uses it" in found.text


# What a command has agreed to touch


def facts_with(case: Case) -> Facts:
    return case.facts()


FORCED = Case(options=options(retry=Retry.FORCE))

RETRIED = {
    "nothing then, nothing now": (FORCED, FORCED, ""),
    "nothing then, a VM now": (FORCED, replace(FORCED, existing=existing()), "another one"),
    "a VM then, the same now": (replace(FORCED, existing=existing()), replace(FORCED, existing=existing()), ""),
    "a VM then, another one now": (
        replace(FORCED, existing=existing()),
        replace(FORCED, existing=existing(uuid="00000000-0000-0000-0000-00000000000f")),
        "another one",
    ),
    "shut off then, running now": (
        replace(FORCED, existing=existing()),
        replace(FORCED, existing=existing(state="running")),
        "was started",
    ),
    "running then and now": (
        replace(FORCED, existing=existing(state="running")),
        replace(FORCED, existing=existing(state="running")),
        "",
    ),
    "no attempt then, another's now": (FORCED, replace(FORCED, staged=staged(operation="theirs")), "another attempt"),
    "an attempt then and now": (
        replace(FORCED, staged=staged(operation="theirs")),
        replace(FORCED, staged=staged(operation="theirs")),
        "",
    ),
    "a VM that is left alone": (Case(), replace(Case(), existing=existing()), ""),
}


@pytest.mark.parametrize("what", RETRIED)
def test_a_retry_touches_nothing_that_was_not_there_at_first(what: str) -> None:
    first, again, words = RETRIED[what]
    refusal = consent_of(first.plan()).refusal(again.plan())
    assert (refusal is not None) is bool(words)
    if refusal is not None:
        assert words in str(refusal)
        assert refusal.exit_code is ExitCode.EXISTS


def test_hosts_of_the_cases_digests() -> None:
    assert not facts_with(Case()).one_host
    assert SOURCE_HOST != OTHER_HOST
