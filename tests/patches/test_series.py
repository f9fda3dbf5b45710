"""The patch series against the pinned llama.cpp, and patchctl against a toy upstream of four files."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import patchctl
from patchctl import PatchError

ROOT = Path(__file__).resolve().parents[2]
MESSAGE = "{subject}\n\nWhy: the test needs it\nKind: hook\nForwarded: not-needed\nRemove-when: never\n"
LINES = "".join(f"line {n}\n" for n in range(1, 31))


# ---------------------------------------------------------------------------------------------- the real series


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """Clean llama.cpp, from the same function as the build's."""
    source = os.environ.get("LLAMA_SEMANTICACHE_SOURCE")
    return patchctl.fetch(ROOT / "build" / "upstream", Path(source) if source else None)


def test_series_verifies(llama_cpp):
    assert [patch.name for patch in patchctl.verify(llama_cpp)] == patchctl.read_series()


def test_series_is_within_the_budget(capsys):
    assert patchctl.main(["stats", "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("stock", [False, True], ids=["patched", "stock"])
def test_series_applies_inside_our_own_repository(stock, llama_cpp, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    made = tmp_path / "build" / "llama.cpp"
    patchctl.apply(llama_cpp, made, stock=stock)
    assert (
        patchctl.tree_id(patchctl.read_blobs(made))
        == patchctl.read_upstream()["stock_tree" if stock else "patched_tree"]
    )
    for patch in patchctl.load_patches():
        if stock and patch.fields["Kind"] != "backport":
            continue
        for path in patch.files:
            clean = llama_cpp / path
            assert not clean.exists() or clean.read_bytes() != (made / path).read_bytes(), f"{path} is unchanged"


# ---------------------------------------------------------------------------------------------- a toy upstream


@dataclass
class Toy:
    """clean: upstream's tree; patches: a folder like patches/; work: git work tree with the patches as commits."""

    clean: Path
    patches: Path
    work: Path

    def pin(self, tree: Path) -> None:
        """Make `tree` the pinned upstream."""
        found = patchctl.tree_id(patchctl.read_blobs(tree))
        (self.patches / "UPSTREAM").write_text(
            f"repo=none\ncommit={'0' * 40}\ntree={found}\nstock_tree={found}\npatched_tree={found}\n"
            f"llama_cpp_python=1.0\nsdist_sha256={'0' * 64}\n"
        )

    def commit(self, subject: str, message: str = MESSAGE) -> None:
        patchctl.git(self.work, "add", "-A")
        patchctl.git(self.work, "commit", "-q", "-m", message.format(subject=subject))

    def edit(self, name: str, old: str, new: str) -> None:
        replace(self.work / name, old, new)


def replace(path: Path, old: str, new: str) -> None:
    data = path.read_bytes()
    assert data.count(old.encode()) == 1
    path.write_bytes(data.replace(old.encode(), new.encode()))


@pytest.fixture
def toy(tmp_path) -> Toy:
    toy = Toy(tmp_path / "clean", tmp_path / "patches", tmp_path / "work")
    (toy.clean / "src").mkdir(parents=True)
    (toy.clean / "src" / "llama.cpp").write_bytes(LINES.encode())
    (toy.clean / "src" / "windows.txt").write_bytes(b"one\r\ntwo\r\nthree\r\n")
    (toy.clean / "src.txt").write_bytes(b"sorts before the folder src\n")
    (toy.clean / ".gitattributes").write_bytes(b"* text=auto eol=crlf\n")
    (toy.clean / ".gitignore").write_bytes(b"run.sh\n")
    (toy.clean / "run.sh").write_bytes(b"#!/bin/sh\n")
    (toy.clean / "run.sh").chmod(0o755)
    toy.patches.mkdir()
    (toy.patches / "series").write_text("# order\n")
    toy.pin(toy.clean)
    shutil.copytree(toy.clean, toy.work)
    (toy.work / ".git").write_text("gitdir: ../../.git/modules/llama.cpp\n")  # as the sdist has it: points nowhere
    patchctl.rebase(toy.work, toy.patches)
    toy.edit("src/llama.cpp", "line 10\n", "line 10\nhook\n")
    toy.commit("core: call the hook")
    (toy.work / "src" / "new.h").write_text("int hook();\n")
    toy.edit("src/windows.txt", "two\r\n", "two\r\nand a half\r\n")
    toy.commit("windows: add a line")
    patchctl.export(toy.work, toy.patches, new_hash=True)
    return toy


def mtimes(tree: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in tree.rglob("*") if path.is_file()}


def test_tree_hash_is_the_one_of_git(toy):
    for tree in (toy.clean, toy.work):
        repo = toy.clean.parent / f"hash-{tree.name}"
        shutil.copytree(tree, repo, ignore=shutil.ignore_patterns(".git"))
        (repo / ".gitattributes").unlink()  # git itself would obey it and change line ends
        expected = patchctl.tree_id(patchctl.read_blobs(repo))
        patchctl.git(repo, "init", "-q")
        patchctl.git(repo, "add", "-A", "-f")
        assert patchctl.git(repo, "write-tree").strip() == expected


def test_round_trip(toy):
    names = ["core-call-the-hook.patch", "windows-add-a-line.patch"]
    assert patchctl.read_series(toy.patches) == names
    assert [patch.name for patch in patchctl.verify(toy.clean, toy.patches)] == names
    before = {path: path.read_bytes() for path in toy.patches.iterdir()}
    assert patchctl.export(toy.work, toy.patches) == names
    assert {path: path.read_bytes() for path in toy.patches.iterdir()} == before


def test_export_does_not_depend_on_who_commits_and_keeps_the_name(toy):
    before = {path: path.read_bytes() for path in toy.patches.glob("*.patch")}
    env = {**os.environ, "GIT_COMMITTER_NAME": "someone", "GIT_COMMITTER_EMAIL": "some@one.invalid"}
    author = ["--author", "Someone <some@one.invalid>", "--date", "2001-01-01T00:00:00"]
    subprocess.run(["git", "commit", "-q", "--amend", "--no-edit", *author], cwd=toy.work, env=env, check=True)
    patchctl.export(toy.work, toy.patches)
    assert {path: path.read_bytes() for path in toy.patches.glob("*.patch")} == before

    (toy.patches / "windows-add-a-line.patch").rename(toy.patches / "short.patch")
    replace(toy.patches / "series", "windows-add-a-line", "short")
    assert patchctl.export(toy.work, toy.patches) == ["core-call-the-hook.patch", "short.patch"]


def test_export_of_a_changed_tree_needs_new_hash(toy):
    toy.edit("src/llama.cpp", "line 20\n", "line 20\nhook 2\n")
    with pytest.raises(PatchError, match="expected everything committed"):
        patchctl.export(toy.work, toy.patches)
    toy.commit("core: call it twice")
    with pytest.raises(PatchError, match="add --new-hash"):
        patchctl.export(toy.work, toy.patches)
    assert len(patchctl.export(toy.work, toy.patches, new_hash=True)) == 3
    patchctl.verify(toy.clean, toy.patches)
    patchctl.git(toy.work, "reset", "-q", "--hard", "HEAD~1")
    assert len(patchctl.export(toy.work, toy.patches, new_hash=True)) == 2  # and the third file is gone
    patchctl.verify(toy.clean, toy.patches)


def test_configuration_of_the_user_changes_nothing(toy, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".gitconfig").write_text(
        "[core]\nautocrlf = true\nfileMode = false\n[commit]\ngpgSign = true\n[format]\nattach = true\nsignOff = true\n"
        "[diff]\nnoprefix = true\n[apply]\nwhitespace = fix\n[user]\nuseConfigOnly = true\n"
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    patchctl.git(toy.work, "config", "format.coverLetter", "true")
    patchctl.verify(toy.clean, toy.patches)
    patchctl.export(toy.work, toy.patches)
    patchctl.verify(toy.clean, toy.patches)


def test_the_stock_tree_has_the_backports_and_nothing_else(toy, tmp_path):
    backport = MESSAGE.replace("Kind: hook", "Kind: backport")
    toy.edit("src.txt", "sorts", "is sorted")
    toy.commit("text: better English", backport)
    with pytest.raises(PatchError, match="text-better-english.patch: expected backports before all other patches"):
        patchctl.export(toy.work, toy.patches, new_hash=True)
    assert len(patchctl.read_series(toy.patches)) == 2

    root, *commits, fix = patchctl.git(toy.work, "rev-list", "--reverse", "HEAD").split()
    patchctl.git(toy.work, "reset", "-q", "--hard", root)
    patchctl.git(toy.work, "cherry-pick", fix, *commits)
    names = patchctl.export(toy.work, toy.patches, new_hash=True)
    assert names[0] == "text-better-english.patch" and len(names) == 3
    pin = patchctl.read_upstream(toy.patches)
    assert len({pin["tree"], pin["stock_tree"], pin["patched_tree"]}) == 3
    patchctl.verify(toy.clean, toy.patches)

    assert patchctl.apply(toy.clean, tmp_path / "stock", toy.patches, stock=True) > 0
    assert patchctl.apply(toy.clean, tmp_path / "stock", toy.patches, stock=True) == 0
    assert patchctl.tree_id(patchctl.read_blobs(tmp_path / "stock")) == pin["stock_tree"]
    assert (tmp_path / "stock" / "src.txt").read_text() == "is sorted before the folder src\n"
    for path in ("src/llama.cpp", "src/windows.txt"):
        assert (tmp_path / "stock" / path).read_bytes() == (toy.clean / path).read_bytes()
    assert not (tmp_path / "stock" / "src" / "new.h").exists()

    replace(toy.patches / "UPSTREAM", f"stock_tree={pin['stock_tree']}", f"stock_tree={'1' * 40}")
    with pytest.raises(PatchError, match="expected the stock tree 1{40}"):
        patchctl.verify(toy.clean, toy.patches)


def test_fuzz_is_refused(toy, tmp_path):
    replace(toy.patches / "core-call-the-hook.patch", " line 9\n", " line nine\n")
    with pytest.raises(PatchError, match=r"core-call-the-hook.patch does not apply strictly"):
        patchctl.apply(toy.clean, tmp_path / "out", toy.patches)
    assert not (tmp_path / "out").exists()


def test_offset_is_found_by_the_round_trip(toy):
    replace(toy.patches / "core-call-the-hook.patch", "@@ -8,6 +8,7 @@", "@@ -9,6 +9,7 @@")
    with pytest.raises(PatchError, match="exported again it differs"):
        patchctl.verify(toy.clean, toy.patches)


@pytest.mark.parametrize("harm", ["content", "mode", "extra", "missing"])
def test_another_clean_tree_is_refused(toy, tmp_path, harm):
    if harm == "content":
        replace(toy.clean / "src.txt", "sorts", "Sorts")
    elif harm == "mode":
        (toy.clean / "run.sh").chmod(0o644)
    elif harm == "extra":
        (toy.clean / "src" / "extra.h").touch()
    else:
        (toy.clean / "src.txt").unlink()
    for command in (
        lambda: patchctl.verify(toy.clean, toy.patches),
        lambda: patchctl.apply(toy.clean, tmp_path / "out", toy.patches),
    ):
        with pytest.raises(PatchError, match=r"expected the clean tree \w{40} .* got \w{40}"):
            command()


def test_wrong_patched_hash_is_refused(toy, tmp_path):
    pin = patchctl.read_upstream(toy.patches)
    replace(toy.patches / "UPSTREAM", f"patched_tree={pin['patched_tree']}", f"patched_tree={'1' * 40}")
    with pytest.raises(PatchError, match="expected the patched tree 1{40}"):
        patchctl.apply(toy.clean, tmp_path / "out", toy.patches)
    assert not (tmp_path / "out").exists()


def test_apply_inside_another_repository_changes_files(toy, tmp_path):
    outer = tmp_path / "outer"
    out = outer / "build" / "llama.cpp"
    out.mkdir(parents=True)
    patchctl.git(outer, "init", "-q")
    assert patchctl.apply(toy.clean, out, toy.patches) > 0
    assert b"line 10\nhook\nline 11\n" in (out / "src" / "llama.cpp").read_bytes()
    assert b"two\r\nand a half\r\n" in (out / "src" / "windows.txt").read_bytes()
    assert os.access(out / "run.sh", os.X_OK)
    assert patchctl.tree_id(patchctl.read_blobs(out)) == patchctl.read_upstream(toy.patches)["patched_tree"]
    assert not (out / ".git").exists()


def test_apply_writes_only_what_changed(toy, tmp_path):
    out = tmp_path / "out"
    patchctl.apply(toy.clean, out, toy.patches)
    for path in out.rglob("*"):
        os.utime(path, (1, 1))
    before = mtimes(out)
    assert patchctl.apply(toy.clean, out, toy.patches) == 0
    assert mtimes(out) == before

    toy.edit("src/llama.cpp", "line 25\n", "line 25\nhook 2\n")
    (toy.work / "src" / "new.h").unlink()
    toy.commit("core: call it twice")
    patchctl.export(toy.work, toy.patches, new_hash=True)
    assert patchctl.apply(toy.clean, out, toy.patches) == 2
    changed = {path.name for path, time in mtimes(out).items() if before[path] != time}
    assert changed == {"llama.cpp"}
    assert not (out / "src" / "new.h").exists()

    (out / "src.txt").write_text("edited in the build\n")
    assert patchctl.apply(toy.clean, out, toy.patches) == 1
    assert (out / "src.txt").read_bytes() == (toy.clean / "src.txt").read_bytes()


def test_apply_sees_a_patch_that_changed_under_an_unchanged_hash(toy, tmp_path):
    patchctl.apply(toy.clean, tmp_path / "out", toy.patches)
    replace(toy.patches / "core-call-the-hook.patch", "+hook\n", "+hack\n")
    with pytest.raises(PatchError, match="expected the patched tree"):
        patchctl.apply(toy.clean, tmp_path / "out", toy.patches)


def test_apply_does_not_overwrite_a_folder_of_someone_else(toy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work\n")
    with pytest.raises(PatchError, match="missing or empty folder"):
        patchctl.apply(toy.clean, tmp_path / "out", toy.patches)
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_empty_series_needs_no_git(toy, tmp_path, monkeypatch):
    for path in toy.patches.glob("*.patch"):
        path.unlink()
    (toy.patches / "series").write_text("")
    toy.pin(toy.clean)
    monkeypatch.setenv("PATH", "")
    assert patchctl.verify(toy.clean, toy.patches) == []
    patchctl.apply(toy.clean, tmp_path / "out", toy.patches)
    assert patchctl.read_blobs(tmp_path / "out") == patchctl.read_blobs(toy.clean)


def test_missing_git_is_said(toy, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PatchError, match="install git"):
        patchctl.verify(toy.clean, toy.patches)


def test_series_and_folder_must_agree(toy):
    extra = toy.patches / "extra.patch"
    shutil.copy(toy.patches / "core-call-the-hook.patch", extra)
    with pytest.raises(PatchError, match="make them equal"):
        patchctl.verify(toy.clean, toy.patches)
    extra.unlink()
    with (toy.patches / "series").open("a") as series:
        series.write("extra.patch\n")
    with pytest.raises(PatchError, match="make them equal"):
        patchctl.verify(toy.clean, toy.patches)


@pytest.mark.parametrize(
    ("subject", "message", "complaint"),
    [
        ("no area", MESSAGE, "area: what"),
        ("core: no fields", "{subject}\n", "no Why, Kind, Forwarded, Remove-when"),
        ("core: no reason", MESSAGE.replace("the test needs it", ""), "no Why"),
        ("core: odd kind", MESSAGE.replace("hook", "edit"), "Kind"),
    ],
)
def test_headers_are_required(toy, subject, message, complaint):
    toy.edit("src.txt", "sorts", "comes")
    toy.commit(subject, message)
    with pytest.raises(PatchError, match=complaint):
        patchctl.export(toy.work, toy.patches, new_hash=True)
    assert len(patchctl.read_series(toy.patches)) == 2


def test_stats_counts_and_fails_above_the_budget(toy, capsys, monkeypatch):
    monkeypatch.setitem(patchctl.BUDGET, "deleted", 0)
    assert patchctl.stats(toy.patches) == {"patches": 2, "added": 3, "deleted": 0, "files": 3}
    stats = ["--patches", str(toy.patches), "stats", "--check"]
    assert patchctl.main(stats) == 0
    toy.edit("src.txt", "sorts before the folder src\n", "++ looks like a header\n")
    toy.commit("core: delete a line")
    patchctl.export(toy.work, toy.patches, new_hash=True)
    assert patchctl.stats(toy.patches) == {"patches": 3, "added": 4, "deleted": 1, "files": 4}
    assert patchctl.main(stats) == 1
    assert "deleted: expected at most 0, got 1" in capsys.readouterr().err


def test_rebase_merges_and_reports_conflicts(toy, tmp_path):
    newer = tmp_path / "newer"
    shutil.copytree(toy.clean, newer)
    replace(newer / "src" / "llama.cpp", "line 8\n", "line eight\n")
    toy.pin(newer)
    shutil.copytree(newer, tmp_path / "new-work")
    with pytest.raises(PatchError, match="does not apply strictly"):
        patchctl.verify(newer, toy.patches)
    patchctl.rebase(tmp_path / "new-work", toy.patches, old=toy.clean)
    patchctl.export(tmp_path / "new-work", toy.patches, new_hash=True)
    patchctl.verify(newer, toy.patches)

    newest = tmp_path / "newest"
    shutil.copytree(newer, newest)
    replace(newest / "src" / "llama.cpp", "line 10\nline 11\n", "line ten\nline eleven\n")
    toy.pin(newest)
    with pytest.raises(PatchError, match=r"core-call-the-hook.patch: conflict .*git am --continue"):
        patchctl.rebase(newest, toy.patches, old=newer)


def test_fetch_takes_trees_and_sdists(toy, tmp_path):
    unpacked = tmp_path / "llama_cpp_python-1.0"
    shutil.copytree(toy.clean, unpacked / "vendor" / "llama.cpp")
    assert patchctl.fetch(tmp_path / "cache", toy.clean, toy.patches) == toy.clean
    assert patchctl.fetch(tmp_path / "cache", unpacked, toy.patches) == unpacked / "vendor" / "llama.cpp"

    packed = tmp_path / "llama_cpp_python-1.0.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(unpacked, unpacked.name)
    with pytest.raises(PatchError, match="expected SHA-256"):
        patchctl.fetch(tmp_path / "cache", packed, toy.patches)
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    replace(toy.patches / "UPSTREAM", f"sdist_sha256={'0' * 64}", f"sdist_sha256={digest}")
    tree = patchctl.fetch(tmp_path / "cache", packed, toy.patches)
    patchctl.verify(tree, toy.patches)

    for wrong, complaint in ((tmp_path, "another folder"), (tmp_path / "nothing", "no file or folder")):
        with pytest.raises(PatchError, match=complaint):
            patchctl.fetch(tmp_path / "cache", wrong, toy.patches)
