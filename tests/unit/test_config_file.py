from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from confighome import config_file, own_home, read, write  # noqa: F401 - the fixtures `file` and `home`
from hypothesis import example, given
from hypothesis import strategies as st

from kvm_clone.errors import UsageError
from kvm_clone.settings import config
from kvm_clone.settings.config import KEYS, Layer, Settings, format_value, get_value, load_settings
from kvm_clone.settings.config_file import Change, init_file, set_value, unset_value


@dataclass(frozen=True)
class Edit:
    name: str
    before: str
    key: str
    value: str | None  # None: unset
    after: str


COMMENTED = "# top\n\n# about pool\npool: a  # why a\n# about route\nroute: relay # why\n\n# end\n"

EDITS = [
    Edit("empty file", "", "pool", "x", "pool: x\n"),
    Edit("no newline at the end", "pool: a", "parallel", "3", "pool: a\nparallel: 3\n"),
    Edit("only a header", "---\n# c\n", "parallel", "3", "---\n# c\nparallel: 3\n"),
    Edit("comments stay on set", COMMENTED, "pool", "b", COMMENTED.replace("pool: a", "pool: b")),
    Edit("comments keep their column", "route:   relay # why\n", "route", "direct", "route: direct  # why\n"),
    Edit("a new key goes last", COMMENTED, "parallel", "3", COMMENTED + "parallel: 3\n"),
    Edit("comments stay on unset", COMMENTED, "pool", None, COMMENTED.replace("pool: a  # why a\n", "")),
    Edit("the last key goes", "pool: a", "pool", None, ""),
    Edit("no value before", "pool:  # c\nverify: no\n", "pool", "x", "pool: x # c\nverify: no\n"),
    Edit("no value, unset", "# c\npool:\nverify: no\n", "pool", None, "# c\nverify: no\n"),
    Edit("no value, comments after", "pool:\n# c\n\nverify: no\n", "pool", None, "# c\n\nverify: no\n"),
    Edit("block", "pool: |-\n  a\n# c\n\nverify: no\n", "pool", "b", "pool: |-\n  b\n# c\n\nverify: no\n"),
    Edit("block, unset", "pool: |\n  a\n# c\n\nverify: no\n", "pool", None, "# c\n\nverify: no\n"),
    Edit("block, comments", "pool: | # c\n  a\n# d\n", "pool", "b", "pool: |-\n  b\n# d\n# c\n"),
    Edit("value below its key", "pool:\n  a # c\nverify: no\n", "pool", "b", "pool: b # c\nverify: no\n"),
    Edit("quotes around it", "pool: 'a'\n", "pool", "b c", "pool: 'b c'\n"),
    Edit("other quotes stay", "pool: 'a'\ntimeout: \"5m\"\n", "pool", None, "timeout: \"5m\"\n"),
    Edit("quoted key", '"pool": a\n', "pool", "b", '"pool": b\n'),
    Edit("a number as text", "", "timeout", "90", "timeout: '90'\n"),
    Edit("tilde is kept", "", "ssh_key_path", " ~/id ", "ssh_key_path: ~/id\n"),
    Edit("case is lowered", "", "log_level", "INFO", "log_level: info\n"),
    Edit("list, new", "", "ssh_options", "A=b,C=d", "ssh_options: [A=b, C=d]\n"),
    Edit("list, commas", "", "ssh_options", '["A=b,c"]', "ssh_options: ['A=b,c']\n"),
    Edit("list, in a row", "ssh_options: [A=b] # c\n", "ssh_options", "C=d", "ssh_options: [C=d] # c\n"),
    Edit(
        "list, one a line",
        "ssh_options:  # c\n  # first\n  - A=b # why\n  - C=d\n\n# next\npool: a\n",
        "ssh_options",
        "E=f,G=h,I=j",
        "ssh_options: [E=f, G=h, I=j] # c\n  # first\n# why\n\n# next\npool: a\n",
    ),
    Edit("list, at left", "ssh_options:\n- A=b # c\n# d\n", "ssh_options", "C=d", "ssh_options: [C=d] # c\n# d\n"),
    Edit("list, another key", "ssh_options:\n- A=b # c\n", "pool", "a", "ssh_options:\n  - A=b # c\npool: a\n"),
    Edit("list, emptied", "ssh_options:\n- A=b\n# c\n", "ssh_options", "[]", "ssh_options: []\n# c\n"),
    Edit("list, unset", "ssh_options:\n- A=b\n- C=d\n# c\npool: a\n", "ssh_options", None, "# c\npool: a\n"),
    Edit("text over two lines", "pool: a\n  b\nverify: no\n", "pool", None, "verify: no\n"),
    Edit("indented mapping", "  pool: a\n", "verify", "no", "pool: a\nverify: false\n"),
    Edit("windows lines", "# pool:\r\nverify: no\r\n", "pool", "a", "# pool:\nverify: no\npool: a\n"),
    Edit("windows lines, unset", "pool: a\r\nverify: no\r\n", "pool", None, "verify: no\n"),
    Edit("flow mapping, set", "{pool: a, verify: no}\n", "pool", "b", "{pool: b, verify: no}\n"),
    Edit("flow mapping, add", "{pool: a} # c\n", "parallel", "3", "{pool: a, parallel: 3} # c\n"),
    Edit("flow mapping, unset", "{pool: a, verify: no} # c\n", "pool", None, "{verify: no}          # c\n"),
    Edit("an alias elsewhere", "pool: &p a\ntimeout: *p\n", "timeout", "5m", "pool: &p a\ntimeout: 5m\n"),
    Edit("a header", "# b\n--- # c\n# d\npool: a\n", "pool", "b", "# b\n--- # c\n# d\npool: b\n"),
    Edit("a header, unset", "# b\n---\n# d\npool: a\n# e\n", "pool", None, "# b\n---\n# d\n# e\n"),
    Edit("an end marker", "pool: a\n... # c\n# d\n", "parallel", "3", "pool: a\nparallel: 3\n... # c\n# d\n"),
    Edit("comments at the end go last", "pool:\n# c", "parallel", "3", "pool:\nparallel: 3\n# c\n"),
    Edit("only comments", "# c", "pool", "x", "# c\npool: x\n"),
    Edit("two of three keys, the middle", "pool: a\n\nverify: no # c\n# d\n\n# e\nroute: auto\n", "verify", None,
         "pool: a\n\n# d\n\n# e\nroute: auto\n"),
    Edit("the last of two keys", "pool: a\n# b\nverify: no # c\n# d\n", "verify", None, "pool: a\n# b\n# d\n"),
    Edit("a number for a key", "7: a # b\n# c\npool: a\n", "7", None, "# c\npool: a\n"),
    Edit("an explicit key", "? pool\n: a\n", "pool", "b", "pool: b\n"),
    Edit("a byte order mark", "\ufeffpool: a\n", "pool", "b", "pool: b\n"),
    Edit("no letters of ours", "pool: \u00e4\u4e2d\U0001f600 # \u00e9\n", "verify", "no",
         "pool: \u00e4\u4e2d\U0001f600 # \u00e9\nverify: false\n"),
    Edit("an unknown key can go", "paralel: 3\npool: a\n", "paralel", None, "pool: a\n"),
    Edit("a bad value can be mended", "parallel: 0\n", "parallel", "3", "parallel: 3\n"),
    Edit("a bad type can be mended", "parallel: true\n", "parallel", "1", "parallel: 1\n"),
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_an_edit_changes_nothing_else(edit: Edit, file: Path) -> None:
    write(file, edit.before)

    def apply() -> Change:
        if edit.value is None:
            return unset_value(file, edit.key, ignore_missing=True)
        return set_value(file, edit.key, edit.value)

    if edit.value is None and edit.key not in KEYS:
        assert unset_value(file, edit.key) == Change(file, changed=True)
    else:
        assert apply() == Change(file, changed=True)
        assert apply() == Change(file, changed=False)
    assert read(file) == edit.after


@pytest.mark.parametrize(
    "before",
    ["parallel: 0\n", "paralel: 3\n", "route: x\npool: a\n"],
    ids=["value", "key", "same value set again"],
)
def test_set_refuses_to_leave_a_file_that_is_not_valid(before: str, file: Path) -> None:
    write(file, before)
    with pytest.raises(UsageError, match="line 1: "):
        set_value(file, "pool", "a")
    assert read(file) == before


def test_unset_of_what_is_not_there(file: Path) -> None:
    missing = file.parent / "none" / "config.yaml"
    write(file, "verify: true\n")
    for path in (file, missing):
        with pytest.raises(UsageError, match=f"pool is not set in {path}"):
            unset_value(path, "pool")
        assert unset_value(path, "pool", ignore_missing=True) == Change(path, changed=False)
    assert not missing.parent.exists()


def test_unset_with_ignore_missing_still_knows_the_names(file: Path) -> None:
    with pytest.raises(UsageError, match="no setting is named 'pol'"):
        unset_value(file, "pol", ignore_missing=True)


def test_unset_works_beside_other_mistakes(file: Path) -> None:
    write(file, "parallel: 0\nrout: x\n")
    unset_value(file, "parallel")
    assert read(file) == "rout: x\n"


def test_writing_leaves_nothing_behind_and_keeps_mode_and_link(tmp_path: Path) -> None:
    real = tmp_path / "real" / "settings"
    real.parent.mkdir()
    write(real, "pool: a\n").chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to("real/settings")
    inode = real.stat().st_ino
    assert set_value(link, "pool", "b") == Change(real, changed=True)
    assert link.is_symlink()
    assert (read(real), real.stat().st_mode & 0o7777) == ("pool: b\n", 0o640)
    assert real.stat().st_ino != inode, "the file was written in place"
    assert os.listdir(real.parent) == ["settings"]


def test_an_unchanged_value_does_not_touch_the_file(file: Path) -> None:
    set_value(file, "pool", "a")
    before = file.stat()
    assert not set_value(file, "pool", "a").changed
    after = file.stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_a_new_file_follows_the_umask_and_a_dangling_link(tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to("later.yaml")
    before = os.umask(0o027)
    try:
        set_value(link, "pool", "a")
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert (tmp_path / "later.yaml").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(call: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, "pool: a\n")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", fail) if call == "fsync" else (Path, "replace", fail)))
    with pytest.raises(UsageError, match=f"cannot write {file}: No space left on device"):
        set_value(file, "pool", "b")
    assert read(file) == "pool: a\n"
    assert sorted(os.listdir(file.parent)) == [file.name, "home"]


def test_a_write_is_durable_before_and_after_the_rename(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append("directory" if target == file.parent else "temporary" if target != file else "target")
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    set_value(file, "pool", "a")
    assert calls == ["temporary", "rename", "directory"]


def test_init_writes_a_template_that_changes_nothing(file: Path) -> None:
    assert init_file(file) == Change(file, changed=True)
    loaded = load_settings(file, {})
    assert loaded.settings == Settings()
    assert {origin.layer for origin in loaded.origins.values()} == {Layer.DEFAULT}
    for key, field in Settings.model_fields.items():
        assert f"\n# {field.description}\n# Accepted: {config.accepts(key)}\n# {key}:" in read(file)


def test_init_leaves_a_file_alone(file: Path) -> None:
    write(file, "not: [valid")
    assert init_file(file) == Change(file, changed=False)
    assert read(file) == "not: [valid"


def test_the_template_uncommented_is_the_defaults(file: Path) -> None:
    init_file(file)
    entries = [line[2:] for line in read(file).splitlines() if line[2:].split(":")[0] in KEYS]
    assert len(entries) == len(KEYS)
    assert load_settings(write(file, "\n".join(entries)), {}).settings == Settings()


def test_set_keeps_the_template_whole_and_unset_restores_it(file: Path) -> None:
    init_file(file)
    fresh = read(file)
    values = {"ssh_options": "A=b,C=d", "pool": "fast", "parallel": "64", "verify": "false"}
    for key, text in values.items():
        set_value(file, key, text)
    assert read(file) == fresh + "ssh_options: [A=b, C=d]\npool: fast\nparallel: 64\nverify: false\n"
    loaded = load_settings(file, {})
    assert {key: format_value(get_value(loaded, key)) for key in values} == values
    for key in values:
        unset_value(file, key)
    assert read(file) == fresh


def test_init_creates_the_directories(home: Path) -> None:
    assert init_file(None) == Change(home / ".config/kvm-clone/config.yaml", changed=True)


TEXT = st.text(st.characters(codec="utf-8"), min_size=1)


@given(pool=TEXT, options=st.lists(TEXT.map(lambda text: f"Key={text}")), parallel=st.integers(1, 64))
def test_what_is_printed_can_be_set(
    pool: str, options: list[str], parallel: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        settings = load_settings(None, {"pool": pool, "ssh_options": options, "parallel": parallel}).settings
    except UsageError:
        return
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    for key in ("pool", "ssh_options", "parallel"):
        set_value(file, key, format_value(getattr(settings, key)))
    assert load_settings(file, {}).settings == settings


LINES = [
    "pool: a", "pool:  # c", "pool: |", "  b", "# pool: z", "# c", "  # d", "", "verify: no", "verify:",
    "---", "timeout: >-", "  5m", "ssh_options:", "- A=b", "  - C=d  # e", "ssh_options: [A=b]",
    "parallel:   3 # c", "{pool: a,", "verify: no}", "...", "\"pool\": a", "? pool", ": a",
]  # fmt: skip


@given(lines=st.lists(st.sampled_from(LINES), max_size=8), newline=st.sampled_from(["\n", "\r\n"]))
@example(lines=["pool: |", "  b", "# c", "verify: no"], newline="\n")
@example(lines=["? pool", "# pool: z"], newline="\n")
def test_an_edit_says_what_was_asked_and_keeps_comments_or_is_refused(
    lines: list[str], newline: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = write(tmp_path_factory.getbasetemp() / "edit.yaml", newline.join(lines))
    expected: dict[str, object] = {}
    try:
        before = load_settings(file, {}).settings
    except UsageError:
        return
    for key, value in (("parallel", 7), ("pool", "x y"), ("pool", None)):
        text = read(file)
        try:
            if value is None:
                unset_value(file, key)
            else:
                set_value(file, key, str(value))
        except UsageError as error:
            assert "cannot edit" in str(error)
            assert read(file) == text
            return
        expected[key] = value
        assert load_settings(file, {}).settings == before.model_copy(update=expected)
    assert read(file).count("# c") >= sum(line.endswith("# c") and line[0] != "p" for line in lines)


@pytest.mark.parametrize("before", ["? pool\n# c\n", "ssh_options: [A=b, # c\n  C=d]\n", "~\n"])
def test_what_would_go_wrong_or_lose_a_comment_is_refused(before: str, file: Path) -> None:
    write(file, before)
    with pytest.raises(UsageError, match=f"{file} is laid out in a way that this program cannot edit"):
        set_value(file, "pool", "a")
    assert read(file) == before
