"""Where a VM's UEFI variables are, and where its clone's are: the definition, the plan, the rewritten definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cases import IDENTITY, IMAGES, ONE_DISK, Case, domain_xml, existing, running

from kvm_clone.definition import variables
from kvm_clone.definition.claims import Claim, Owner, claims_of
from kvm_clone.definition.domain_xml import parse, read_domain
from kvm_clone.definition.marks import Seal, definition_digest
from kvm_clone.definition.variables import DIRECTORY, KEY, Variables
from kvm_clone.image import Image
from kvm_clone.options import CloneOptions, Retry
from kvm_clone.planning import steps
from kvm_clone.planning.clone_xml import clone_xml, planned_mark
from kvm_clone.planning.facts import Directory, ImageFacts
from kvm_clone.planning.plan import Plan, make_plan

CODE = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/CODE.fd</loader>"
CHOSEN = "<firmware><feature enabled='no' name='secure-boot'/></firmware>"
FILE = f"{DIRECTORY}/web_VARS.fd"

READ: dict[str, tuple[str, Variables | None]] = {
    "BIOS": ("", None),
    "a loader that is no flash": ("<loader type='rom'>/bios</loader>", None),
    "a loader alone": (CODE, Variables()),
    "a file": (f"{CODE}<nvram template='/t'> /v.fd </nvram>", Variables("/v.fd")),
    "a source": (f"{CODE}<nvram type='file'><source file='/v.fd'/></nvram>", Variables("/v.fd")),
    "qcow2": (f"{CODE}<nvram format='qcow2'>/v</nvram>", Variables("/v", "qcow2")),
    "a template alone": (f"{CODE}<nvram template='/t'/>", Variables()),
    "stateless": (CODE.replace("readonly", "stateless='yes' readonly"), None),
    "in the loader": (CODE.replace(" readonly='yes'", ""), None),
    "on a device": (f"{CODE}<nvram type='block'><source dev='/dev/x'/></nvram>", None),
}


@pytest.mark.parametrize("what", READ)
def test_what_a_definition_says(what: str) -> None:
    os, expected = READ[what]
    assert read_domain(domain_xml(ONE_DISK, os)).variables == expected


def test_a_loader_that_libvirt_chooses() -> None:
    xml = domain_xml(ONE_DISK, CHOSEN).replace("<os>", "<os firmware='efi'>")
    found = read_domain(xml).variables
    assert found == Variables(chosen=True)
    assert found.paths("web") == (FILE, f"{DIRECTORY}/web_VARS.qcow2")
    assert [found.format_of(path) for path in found.paths("web")] == ["raw", "qcow2"]
    assert Variables("/v", "qcow2").paths("web") == ("/v",)
    assert Variables("/v", "qcow2").format_of("/v") == "qcow2"


def test_a_host_that_has_no_firmware_to_choose_from() -> None:
    xml = domain_xml(ONE_DISK, CHOSEN).replace("<os>", "<os firmware='efi'>")
    facts = Case(abilities={"uefi": False}).facts()
    chosen = replace(facts, source=replace(facts.source, xml=read_domain(xml)))
    codes = [one.code for one in make_plan(chosen, CloneOptions(), IDENTITY).findings]
    assert codes == ["firmware"]
    named = replace(facts, source=replace(facts.source, xml=read_domain(domain_xml(ONE_DISK, CODE))))
    assert "firmware" not in [one.code for one in make_plan(named, CloneOptions(), IDENTITY).findings]


# The plan.

NVRAM = Directory(DIRECTORY, exists=True, writable=True, free=1 << 40)
IMAGE = ImageFacts(FILE, "raw", target=KEY, virtual_size=540672, data=540672, fingerprint="1:9:540672:1:1")


def case(
    os: str = CODE,
    image: ImageFacts | None = IMAGE,
    *,
    nvram: Directory | None = NVRAM,
    **more: object,
) -> Case:
    directories = (Directory(IMAGES, exists=True, writable=True, free=1 << 40), *([nvram] if nvram else []))
    usual = {"present": ("/usr/share/OVMF/CODE.fd",), "directories": directories}
    return Case(os=os, variables=image, **{**usual, **more})  # type: ignore[arg-type]


def plan(*args: object, **more: object) -> Plan:
    made = case(*args, **more).plan()  # type: ignore[arg-type]
    assert made.refusal() is None, made.findings
    return made


def place(made: Plan) -> str:
    return next(disk.final for disk in made.disks if disk.key == KEY)


def written(made: Plan) -> str:
    """What the clone's definition says in <nvram>."""
    found = read_domain(clone_xml(made, planned_mark(made))).variables
    return found.path if found is not None else "none"


def test_the_file_is_an_asset_beside_the_disks() -> None:
    made = plan()
    assert [disk.key for disk in made.disks] == ["vda", KEY]
    assert place(made) == FILE
    copied = next(step for step in made.steps if isinstance(step, steps.CopyDisks))
    assert [disk.key for disk in copied.disks] == ["vda", KEY]
    assert written(made) == "", "libvirt looks for it there by itself"


def test_a_clone_of_another_name_has_a_file_of_that_name() -> None:
    made = plan(options=CloneOptions(new_name="other"))
    assert place(made) == f"{DIRECTORY}/other_VARS.fd"
    assert written(made) == ""


@pytest.mark.parametrize(
    ("os", "image", "final", "said"),
    [
        (f"{CODE}<nvram>/odd/v.bin</nvram>", replace(IMAGE, path="/odd/v.bin"), f"{DIRECTORY}/web_VARS.bin", None),
        (f"{CODE}<nvram type='file'><source file='{FILE}'/></nvram>", IMAGE, FILE, None),
        (f"{CODE}<nvram template='/t'/>", IMAGE, FILE, ""),
    ],
    ids=["of a name of its own", "a source", "a template alone"],
)
def test_a_definition_that_names_the_file_names_the_clones(
    os: str, image: ImageFacts, final: str, said: str | None
) -> None:
    made = plan(os, image)
    assert place(made) == final
    assert written(made) == (final if said is None else said)


def test_a_name_that_is_taken() -> None:
    made = plan(nvram=replace(NVRAM, names=frozenset({"web_VARS.fd"})))
    assert place(made) == f"{DIRECTORY}/web_VARS-nvram.fd"
    assert written(made) == place(made)


def test_a_host_without_libvirts_directory() -> None:
    made = plan(nvram=None)
    assert place(made) == f"{IMAGES}/web_VARS.fd"
    assert written(made) == place(made)


def test_a_pool_is_for_disks() -> None:
    made = plan(options=CloneOptions(pool="default"))
    assert place(made) == FILE


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("os", [CODE, f"{CODE}<nvram>/odd/v.bin</nvram>"], ids=["unsaid", "named"])
def test_a_vm_that_was_never_started(os: str, taken: bool) -> None:
    names = frozenset({"web_VARS.fd", "web_VARS.bin"}) if taken else frozenset[str]()
    made = plan(os, None, nvram=replace(NVRAM, names=names))
    assert [disk.key for disk in made.disks] == ["vda"]
    end = ".bin" if "odd" in os else ".fd"
    expected = f"{DIRECTORY}/web_VARS{'-nvram' if taken else ''}{end}"
    assert written(made) == (expected if taken or "odd" in os else "")


@pytest.mark.parametrize(
    "before", ["<nvram template='/t'>/old</nvram>", "<nvram type='file'><source file='/old'/></nvram>", ""]
)
def test_the_path_in_the_definition(before: str) -> None:
    document, domain, _ = parse(domain_xml(ONE_DISK, CODE + before))
    variables.set_path(document, domain, "/a & b", "raw")
    found = read_domain(document.result())
    assert found.variables == Variables("/a & b")
    assert ("template='/t'" in document.result()) == ("template" in before)


def test_a_format_that_libvirt_does_not_assume_is_written() -> None:
    document, domain, _ = parse(domain_xml(ONE_DISK, CODE))
    variables.set_path(document, domain, "/v", "qcow2")
    assert read_domain(document.result()).variables == Variables("/v", "qcow2")


# A running VM.


def running_case(os: str, image: ImageFacts | None, now: str) -> Case:
    how = running(variables=now)
    del how["devices"]
    return case(os, image, **how)


def live(os: str, image: ImageFacts | None, now: str) -> list[str]:
    return [finding.code for finding in running_case(os, image, now).plan().findings]


def test_variables_of_a_running_vm_are_read_from_their_file_and_must_not_change() -> None:
    made = running_case(CODE, IMAGE, FILE).plan()
    assert made.refusal() is None
    assert made.backup is not None
    assert [disk.target for disk in made.backup.disks] == ["vda"]
    (checked,) = [step for step in made.steps if isinstance(step, steps.CheckSource)]
    assert [disk.key for disk in checked.disks] == [KEY]
    assert [type(step) for step in made.steps].index(steps.EndBackup) > made.steps.index(checked)


@pytest.mark.parametrize(
    ("image", "now", "expected"),
    [
        (IMAGE, FILE, []),
        (None, "", []),
        (IMAGE, "/other", ["variables-live"]),
        (None, FILE, ["variables-live"]),
        (replace(IMAGE, format="qcow2"), FILE, ["variables-format"]),
    ],
    ids=["as defined", "none", "another file", "a file that is gone", "qcow2"],
)
def test_a_running_vm(image: ImageFacts | None, now: str, expected: list[str]) -> None:
    assert live(CODE, image, now) == expected


def test_an_image_of_variables_is_called_by_what_it_is() -> None:
    made = case(image=replace(IMAGE, error="kc-a: no", in_use=True)).plan()
    (finding,) = made.findings
    assert (finding.code, finding.subject) == ("disk-in-use", KEY)
    assert finding.text.startswith(f"File of UEFI variables ({FILE})")


# The VM at the destination.


def test_a_replica_is_used_when_its_variables_have_changed() -> None:
    there = existing(os=CODE)
    prints = {"vda": "1:2:3:4:5", KEY: "1:9:540672:1:1"}
    there = replace(
        there, files={**there.files, FILE: prints[KEY]}, seal=Seal(definition_digest(there.domain.xml), prints)
    )
    assert there.unused
    for changed in ("1:9:540672:2:1", "1:9:540672:1:2", "1:8:540672:1:1"):
        assert not replace(there, files={**there.files, FILE: changed}).unused
    gone = {path: text for path, text in there.files.items() if path != FILE}
    assert not replace(there, files=gone).unused


def test_the_one_that_is_replaced_keeps_its_file_until_the_commit() -> None:
    there = existing(os=CODE)
    there = replace(there, removable=(f"{IMAGES}/old.qcow2", FILE))
    made = plan(
        nvram=replace(NVRAM, names=frozenset({"web_VARS.fd"})),
        existing=there,
        options=CloneOptions(retry=Retry.FORCE),
    )
    (removed,) = [step for step in made.steps if isinstance(step, steps.RemoveReplaced)]
    assert FILE in removed.paths
    assert place(made) == f"{DIRECTORY}/web_VARS-nvram.fd"
    assert made.variables == Image(place(made), "raw")


def test_what_libvirt_chooses_is_used_by_the_vm_too() -> None:
    by = Owner("web", "u")
    assert [one.path for one in claims_of(domain_xml("", CODE), by) if isinstance(one, Claim) if KEY in one.path] == [
        FILE,
        f"{DIRECTORY}/web_VARS.qcow2",
    ]
    said = [one.path for one in claims_of(domain_xml("", f"{CODE}<nvram>/v</nvram>"), by) if isinstance(one, Claim)]
    assert "/v" in said
    assert FILE not in said
