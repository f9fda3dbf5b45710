#!/usr/bin/env python3
"""Fetch the pinned llama.cpp and verify, apply, export, rebase and count the patches of this folder.

Three trees are pinned: *clean* upstream, *stock*, which is upstream with our backports of its faults and what we
compare with, and *patched*, which has all patches.

Only tree hashes decide, never exit codes: `git apply` inside another repository can exit 0 and change nothing.
Hashes of plain folders are computed here, so neither a `.git`, nor line-ending settings, nor a git identity of the
user matters.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUDGET = {"patches": 8, "added": 250, "deleted": 4}  # raised only with a reason in README.md
FIELDS = ("Why", "Kind", "Forwarded", "Remove-when")
KINDS = ("hook", "build", "backport")
NAME, EMAIL = "The llama-semanticache authors", "authors@llama-semanticache.invalid"
DATE = "Thu, 1 Jan 2026 00:00:00 +0000"

# Local configuration of a tree must not change what is hashed or written.
CONFIG = {
    "am.threeWay": "false",
    "apply.whitespace": "nowarn",
    "commit.gpgSign": "false",
    "core.attributesFile": os.devnull,
    "core.autocrlf": "false",
    "core.fileMode": "true",
    "core.hooksPath": os.devnull,
    "core.quotePath": "false",
    "core.safecrlf": "false",
    "diff.external": "",
    "diff.interHunkContext": "0",
    "diff.mnemonicPrefix": "false",
    "diff.noprefix": "false",
    "format.encodeEmailHeaders": "false",
    "gc.auto": "0",
    "i18n.commitEncoding": "utf-8",
    "safe.directory": "*",
}


class PatchError(Exception):
    """Something is not as pinned; the text says what was expected, what was found and what to do."""


def read_upstream(patches: Path = HERE) -> dict[str, str]:
    """The key=value lines of UPSTREAM."""
    lines = (patches / "UPSTREAM").read_text(encoding="utf-8").splitlines()
    pin = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    keys = {"repo", "commit", "tree", "stock_tree", "patched_tree", "llama_cpp_python", "sdist_sha256"}
    if pin.keys() != keys:
        raise PatchError(f"{patches / 'UPSTREAM'}: expected the keys {sorted(keys)}, got {sorted(pin)}")
    return pin


def read_series(patches: Path = HERE) -> list[str]:
    """File names of the patches in the order of their application."""
    lines = (patches / "series").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


# ---------------------------------------------------------------------------------------------- patches as text


@dataclass
class Patch:
    """One mail of `git format-patch`."""

    name: str
    text: str
    subject: str
    fields: dict[str, str]
    files: list[str]  # paths that it touches
    added: int  # lines
    deleted: int


def parse_patch(name: str, text: str) -> Patch:
    """Take a patch apart; text keeps its bytes (surrogateescape)."""
    message, _, diff = re.sub(r"(?m)^diff --git ", "\0diff --git ", text, count=1).partition("\0")
    subject = re.search(r"^Subject: (.*(?:\n[ \t].*)*)", message, re.M)
    fields = dict(re.findall(rf"^({'|'.join(FIELDS)}): *(\S.*)$", message, re.M))
    files: list[str] = []
    count = {" ": 0, "+": 0, "-": 0}
    old = new = 0  # lines of the present hunk that are still to come
    for line in diff.splitlines():
        if old > 0 or new > 0:
            kind = line[:1] or " "
            if kind in count:
                count[kind] += 1
                old -= kind != "+"
                new -= kind != "-"
        elif hunk := re.match(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
            old, new = (int(n or 1) for n in hunk.groups())
        elif path := re.match(r"diff --git a/(.+) b/\1$", line):
            files.append(path[1])
    return Patch(
        name, text, re.sub(r"\n[ \t]", " ", subject[1]) if subject else "", fields, files, count["+"], count["-"]
    )


def check_header(patch: Patch) -> None:
    """Refuse a patch that does not say what it is for and when it can go."""
    if not re.match(r"[a-z0-9][a-z0-9-]*: \S", patch.subject):
        raise PatchError(f"{patch.name}: expected the subject 'area: what', got {patch.subject!r}; reword the commit")
    if missing := [field for field in FIELDS if field not in patch.fields]:
        raise PatchError(
            f"{patch.name}: no {', '.join(missing)} line in the message; every patch has {', '.join(FIELDS)}"
        )
    if patch.fields["Kind"] not in KINDS:
        raise PatchError(f"{patch.name}: expected Kind to be one of {', '.join(KINDS)}, got {patch.fields['Kind']!r}")
    if not patch.files:
        raise PatchError(f"{patch.name}: expected a diff, got none; export it again")


def load_patches(patches: Path = HERE) -> list[Patch]:
    """All patches of the series, with headers checked and no patch file outside the series."""
    series = read_series(patches)
    found = sorted(path.name for path in patches.glob("*.patch"))
    if sorted(series) != found:
        raise PatchError(f"{patches / 'series'} lists {sorted(series)}, the folder holds {found}; make them equal")
    loaded = [parse_patch(name, (patches / name).read_bytes().decode("utf-8", "surrogateescape")) for name in series]
    for patch in loaded:
        check_header(patch)
    check_order(loaded)
    return loaded


def check_order(series: list[Patch]) -> None:
    """Refuse a backport behind a patch of another kind: the stock tree is a beginning of the series."""
    kinds = [patch.fields["Kind"] == "backport" for patch in series]
    if kinds != sorted(kinds, reverse=True):
        late = series[kinds.index(False) + kinds[kinds.index(False) :].index(True)]
        raise PatchError(
            f"{late.name}: expected backports before all other patches, got one behind; reorder the commits"
        )


# ---------------------------------------------------------------------------------------------- trees and git


def git(cwd: Path, *args: str) -> str:
    """Run git in `cwd` with fixed identity and date and no configuration of the user or the machine."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1", LC_ALL="C", TZ="UTC", GIT_EDITOR="true")
    env.update(GIT_CEILING_DIRECTORIES=str(cwd.resolve().parent), GIT_ATTR_NOSYSTEM="1")
    for who in ("AUTHOR", "COMMITTER"):
        env.update({f"GIT_{who}_NAME": NAME, f"GIT_{who}_EMAIL": EMAIL, f"GIT_{who}_DATE": DATE})
    settings = [word for key, value in CONFIG.items() for word in ("-c", f"{key}={value}")]
    try:
        run = subprocess.run(["git", *settings, *args], cwd=cwd, env=env, capture_output=True)
    except FileNotFoundError as error:
        raise PatchError("git is needed to apply the patches and was not found; install git and run again") from error
    out, err = (stream.decode("utf-8", "surrogateescape") for stream in (run.stdout, run.stderr))
    if run.returncode:
        raise PatchError(f"git {args[0]} failed in {cwd}:\n{out}{err}".rstrip())
    return out


def is_work_tree(tree: Path) -> bool:
    """Whether `tree` is the top of a git work tree whose repository is really there."""
    if not (tree / ".git").exists():
        return False
    try:
        return Path(git(tree, "rev-parse", "--show-toplevel").rstrip("\n")) == tree.resolve()
    except PatchError:
        return False  # the `.git` file of a submodule that was copied without its repository


def init_repo(repo: Path) -> None:
    """Make a git repository in which no `.gitattributes` of the tree changes the bytes of a file."""
    git(repo, "init", "-q", ".")
    (repo / ".git" / "info").mkdir(exist_ok=True)
    (repo / ".git" / "info" / "attributes").write_text("* -text -ident -filter !diff !eol\n", encoding="utf-8")


def read_file(path: Path) -> tuple[str, bytes]:
    """Git mode and contents of a file."""
    if path.is_symlink():
        return "120000", os.fsencode(os.readlink(path))
    return "100755" if path.stat().st_mode & 0o100 else "100644", path.read_bytes()


def write_file(path: Path, mode: str, data: bytes) -> None:
    """Inverse of read_file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if mode == "120000":
        path.symlink_to(os.fsdecode(data))
    else:
        path.write_bytes(data)
        path.chmod(0o755 if mode == "100755" else 0o644)


def blob_id(mode: str, data: bytes) -> tuple[str, bytes]:
    """Git mode and git's SHA-1 of a file's contents."""
    return mode, hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).digest()


def read_blobs(tree: Path) -> dict[str, tuple[str, bytes]]:
    """Mode and SHA-1 of every file below `tree`: the tracked ones of a git work tree, else all."""
    if not tree.is_dir():
        raise PatchError(f"expected a llama.cpp tree, got {tree}, which is no folder")
    if is_work_tree(tree):
        paths = [path for path in git(tree, "ls-files", "-z").split("\0") if path and (tree / path).exists()]
    else:
        paths = []
        for root, dirs, names in os.walk(tree):
            links = [name for name in dirs if (Path(root) / name).is_symlink()]
            dirs[:] = [name for name in dirs if name != ".git" and name not in links]
            paths += [(Path(root) / name).relative_to(tree).as_posix() for name in names + links if name != ".git"]
    return {path: blob_id(*read_file(tree / path)) for path in paths}


def tree_id(blobs: dict[str, tuple[str, bytes]]) -> str:
    """Git's hash, 40 hex digits, of a tree with these files."""
    entries: dict[bytes, tuple[bytes, bytes]] = {}  # sort key: name, with a slash after folders
    folders: dict[str, dict[str, tuple[str, bytes]]] = {}
    for path, (mode, digest) in blobs.items():
        name, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(name, {})[rest] = (mode, digest)
        else:
            entries[os.fsencode(name)] = (b"%s %s\0" % (mode.encode(), os.fsencode(name)), digest)
    for name, children in folders.items():
        entries[os.fsencode(name) + b"/"] = (b"40000 %s\0" % os.fsencode(name), bytes.fromhex(tree_id(children)))
    data = b"".join(head + digest for _, (head, digest) in sorted(entries.items()))
    return hashlib.sha1(b"tree %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def check_clean(tree: Path, blobs: dict[str, tuple[str, bytes]], pin: dict[str, str]) -> None:
    """Refuse a tree that is not the pinned one."""
    if (got := tree_id(blobs)) != pin["tree"]:
        raise PatchError(
            f"{tree}: expected the clean tree {pin['tree']} of llama.cpp {pin['commit'][:12]}, got {got}; "
            f"use the llama.cpp of the llama-cpp-python {pin['llama_cpp_python']} sdist, "
            "or delete that folder if the build unpacked it"
        )


def apply_series(src: Path, series: list[Patch], repo: Path) -> dict[str, tuple[str, bytes] | None]:
    """Commit the files that the series touches to the new repository `repo`, then `git am` each patch strictly.

    Returns mode and contents of each touched file, None where it was deleted. Other files of the tree are not needed.
    """
    touched = sorted({path for patch in series for path in patch.files})
    init_repo(repo)
    for path in touched:
        if (src / path).exists():
            write_file(repo / path, *read_file(src / path))
    git(repo, "add", "-A", "-f", ".")
    git(repo, "commit", "-q", "--no-verify", "--allow-empty", "-m", "upstream")
    for patch in series:
        mail = repo / ".git" / patch.name
        mail.write_bytes(patch.text.encode("utf-8", "surrogateescape"))
        try:
            git(repo, "am", "-q", "--no-3way", "--keep-cr", "--no-scissors", str(mail))
        except PatchError as error:
            raise PatchError(
                f"{patch.name} does not apply strictly to {src}; rebase it (patches/README.md)\n{error}"
            ) from error
    return {path: read_file(repo / path) if (repo / path).exists() else None for path in touched}


def patch_tree(src: Path, patches: Path, repo: Path, stock: bool = False) -> tuple[dict, dict]:
    """Check the clean tree, apply the series (for the stock tree its backports) in `repo`, check the resulting tree.

    Returns the blobs of that tree and the touched files (see apply_series).
    """
    pin, series, blobs = read_upstream(patches), load_patches(patches), read_blobs(src)
    check_clean(src, blobs, pin)
    series = [patch for patch in series if not stock or patch.fields["Kind"] == "backport"]
    touched = apply_series(src, series, repo) if series else {}
    for path, file in touched.items():
        blobs.pop(path, None)
        if file:
            blobs[path] = blob_id(*file)
    kind = "stock" if stock else "patched"
    if (got := tree_id(blobs)) != pin[f"{kind}_tree"]:
        raise PatchError(
            f"expected the {kind} tree {pin[f'{kind}_tree']}, got {got}: patches and UPSTREAM do not belong together; "
            "after a change of the patches run `patchctl.py export TREE --new-hash`"
        )
    return blobs, touched


def format_patch(tree: Path, commit: str) -> str:
    """The mail of one commit; author and date are fixed, so that the same change gives the same bytes from everyone."""
    text = git(
        tree,
        "format-patch",
        "--stdout",
        "-1",
        commit,
        "--keep-subject",  # no [PATCH n/m], which would change when a patch is added
        "--zero-commit",  # the commit's own hash depends on its parents
        "--no-signature",  # git's version
        "--full-index",  # the short length depends on the size of the repository
        "--no-attach",
        "--no-base",
        "--no-cover-letter",
        "--no-notes",
        "--no-signoff",
        "--no-add-header",
        "--no-to",
        "--no-cc",
        "--no-stat",
        "--no-renames",
        "--no-ext-diff",
        "--no-textconv",
        "--diff-algorithm=myers",
        "-U3",
    )
    for key, value in (("From", f"{NAME} <{EMAIL}>"), ("Date", DATE)):
        text = re.sub(rf"^{key}: .*(\n[ \t].*)*$", f"{key}: {value}", text, count=1, flags=re.M)
    return text


# ---------------------------------------------------------------------------------------------- commands


def fetch(cache: Path, source: Path | None = None, patches: Path = HERE) -> Path:
    """Return the clean llama.cpp tree, obtaining the pinned sdist through pip if `source` is not given.

    source: a llama.cpp tree, an unpacked llama-cpp-python sdist, or the packed sdist, which is unpacked into `cache`.
    """
    pin = read_upstream(patches)
    if source and source.is_dir():
        for tree in (source / "vendor" / "llama.cpp", source):
            if (tree / "src" / "llama.cpp").is_file():
                return tree
        raise PatchError(
            f"{source}: expected a llama.cpp tree or an unpacked llama-cpp-python sdist, got another folder"
        )
    cache.mkdir(parents=True, exist_ok=True)
    sdist = source or cache / f"llama_cpp_python-{pin['llama_cpp_python']}.tar.gz"
    if not sdist.is_file():
        if source:
            raise PatchError(f"{source}: expected a llama.cpp tree or a llama-cpp-python sdist, got no file or folder")
        download(sdist, pin)
    if (got := hashlib.sha256(sdist.read_bytes()).hexdigest()) != pin["sdist_sha256"]:
        raise PatchError(f"{sdist}: expected SHA-256 {pin['sdist_sha256']}, got {got}; delete it and run again")
    tree = cache / f"llama.cpp-{pin['tree'][:12]}"
    if not tree.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as tmp, tarfile.open(sdist) as tar:
            inside = [m for m in tar if "/vendor/llama.cpp/" in m.name and (m.isfile() or m.isdir())]
            tar.extractall(tmp, inside, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
            (unpacked,) = Path(tmp).glob("*/vendor/llama.cpp")
            (unpacked / ".git").unlink(missing_ok=True)  # points to a repository that is not unpacked
            try:
                unpacked.rename(tree)
            except OSError:
                if not tree.is_dir():  # else another process was faster
                    raise
    return tree


def download(sdist: Path, pin: dict[str, str]) -> None:
    """Obtain the sdist with pip, which refuses another hash before it runs any code of it."""
    if importlib.util.find_spec("pip") is None:
        raise PatchError(
            f"{sys.executable} has no pip to fetch llama-cpp-python with; name a source (LLAMA_SEMANTICACHE_SOURCE)"
        )
    print(f"patchctl: fetching llama-cpp-python {pin['llama_cpp_python']} (source, 77 MB)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=sdist.parent) as tmp:
        wanted = Path(tmp) / "requirements.txt"
        wanted.write_text(
            f"llama-cpp-python=={pin['llama_cpp_python']} --hash=sha256:{pin['sdist_sha256']}\n", encoding="utf-8"
        )
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        # pip asks the sdist for its metadata, which needs its build backend
        if importlib.util.find_spec("scikit_build_core"):
            command.append("--no-build-isolation")
        run = subprocess.run([*command, "--dest", tmp, "-r", str(wanted)], stdout=sys.stderr)
        if run.returncode or not (got := Path(tmp) / sdist.name).is_file():
            raise PatchError(
                f"pip could not fetch llama-cpp-python {pin['llama_cpp_python']} (exit {run.returncode}, see above); "
                "check the network, or name a local sdist or llama.cpp tree (LLAMA_SEMANTICACHE_SOURCE)"
            )
        got.replace(sdist)


def verify(tree: Path, patches: Path = HERE) -> list[Patch]:
    """Check the whole chain from the clean tree to the patches and back; returns the patches."""
    series = load_patches(patches)
    with tempfile.TemporaryDirectory() as tmp:
        patch_tree(tree, patches, Path(tmp), stock=True)
    with tempfile.TemporaryDirectory() as tmp:
        repo = Path(tmp)
        patch_tree(tree, patches, repo)
        commits = git(repo, "rev-list", "--reverse", "HEAD").split()[1:] if series else []
        for patch, commit in zip(series, commits, strict=True):
            if format_patch(repo, commit) != patch.text:
                raise PatchError(
                    f"{patch.name}: applied and exported again it differs; export it with `patchctl.py export TREE`"
                )
    return series


def apply(src: Path, dst: Path, patches: Path = HERE, stock: bool = False) -> int:
    """Make `dst` the patched or the stock tree; returns the number of files written or deleted, 0 if it was up to date.

    Only files that differ are written, so that a build folder stays valid. `<dst>.stamp` marks a folder made here.
    """
    inputs = [patches / name for name in ("UPSTREAM", "series", *read_series(patches))]
    key = hashlib.sha256(b"\0".join(path.read_bytes() for path in inputs if path.is_file())).hexdigest()
    stamp = dst.with_name(dst.name + ".stamp")
    have = read_blobs(dst) if dst.is_dir() else {}
    done = tree_id(have) == read_upstream(patches)["stock_tree" if stock else "patched_tree"]
    if done and stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return 0
    if have and not done and not stamp.is_file():
        raise PatchError(
            f"{dst}: expected a missing or empty folder, or one made by `patchctl.py apply`, got another; remove it"
        )
    with tempfile.TemporaryDirectory() as tmp:
        want, touched = patch_tree(src, patches, Path(tmp), stock)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text("incomplete", encoding="utf-8")
    written = [path for path, blob in want.items() if have.get(path) != blob]
    for path in written:
        write_file(dst / path, *(touched.get(path) or read_file(src / path)))
    deleted = have.keys() - want.keys()
    for path in deleted:
        (dst / path).unlink()
    if (got := tree_id(read_blobs(dst))) != tree_id(want):
        raise PatchError(
            f"{dst}: expected the tree {tree_id(want)} after copying, got {got}; is something else writing there?"
        )
    stamp.write_text(key, encoding="utf-8")
    return len(written) + len(deleted)


def export(tree: Path, patches: Path = HERE, new_hash: bool = False) -> list[str]:
    """Write the commits of the work tree `tree` on top of upstream as patches; returns the file names in order.

    A patch keeps its file name as long as its subject stays; a new one is named after its subject.
    """
    pin = read_upstream(patches)
    if not is_work_tree(tree):
        raise PatchError(f"{tree}: expected a git work tree, got none; make one with `patchctl.py rebase TREE`")
    if changed := git(tree, "status", "--porcelain", "--untracked-files=no"):
        raise PatchError(f"{tree}: expected everything committed, got\n{changed.rstrip()}")
    history = [line.split() for line in git(tree, "log", "--format=%H %T %P").splitlines()]
    above = next((n for n, (_, root, *_) in enumerate(history) if root == pin["tree"]), None)
    if above is None:
        raise PatchError(
            f"{tree}: expected a commit with the tree {pin['tree']} below HEAD, got none; "
            "another work tree is needed, or UPSTREAM was not moved"
        )
    if any(len(parents) != 1 for _, _, *parents in history[:above]):
        raise PatchError(f"{tree}: expected one line of commits above upstream, got a merge")
    head = history[0][1]
    if head != pin["patched_tree"] and not new_hash:
        raise PatchError(
            f"{tree}: expected the patched tree {pin['patched_tree']}, got {head}; if that is meant, add --new-hash"
        )

    old = {
        parse_patch(path.name, path.read_bytes().decode("utf-8", "surrogateescape")).subject: path.name
        for path in patches.glob("*.patch")
    }
    made: dict[str, Patch] = {}
    stock = pin["tree"]
    for commit, root, *_ in reversed(history[:above]):
        text = format_patch(tree, commit)
        subject = parse_patch("", text).subject
        name = old.get(subject) or re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-") + ".patch"
        if name in made:
            raise PatchError(f"{tree}: two commits would become {name}; squash them or reword one")
        made[name] = parse_patch(name, text)
        check_header(made[name])
        if made[name].fields["Kind"] == "backport":
            stock = root
    check_order(list(made.values()))

    for name, patch in made.items():
        (patches / name).write_bytes(patch.text.encode("utf-8", "surrogateescape"))
    for path in patches.glob("*.patch"):
        if path.name not in made:
            path.unlink()
    series, upstream = patches / "series", patches / "UPSTREAM"
    comments = [line for line in series.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    series.write_text("\n".join([*comments, *made]) + "\n", encoding="utf-8")
    pins = upstream.read_text(encoding="utf-8")
    for key, value in (("stock_tree", stock), ("patched_tree", head)):
        pins = re.sub(rf"(?m)^{key}=.*$", f"{key}={value}", pins)
    upstream.write_text(pins, encoding="utf-8")
    return list(made)


def rebase(tree: Path, patches: Path = HERE, old: Path | None = None) -> None:
    """Turn `tree`, clean upstream as pinned, into a work tree with one commit per patch, merging three-way.

    old: the clean tree that the patches were made for; git needs its files for a three-way merge.
    """
    pin, series = read_upstream(patches), load_patches(patches)
    if not is_work_tree(tree):
        check_clean(tree, read_blobs(tree), pin)
        if (tree / ".git").is_file():
            (tree / ".git").unlink()  # points to a repository that is not there
        init_repo(tree)
        git(tree, "add", "-A", "-f", ".")
        git(tree, "commit", "-q", "--no-verify", "-m", f"llama.cpp {pin['commit']}")
    if (head := git(tree, "rev-parse", "HEAD^{tree}").strip()) != pin["tree"]:
        raise PatchError(f"{tree}: expected HEAD at the clean tree {pin['tree']}, got {head}; check it out first")
    for path in sorted({path for patch in series for path in patch.files}) if old else []:
        if (old / path).exists():
            git(tree, "hash-object", "-w", "--no-filters", str((old / path).resolve()))
    for number, patch in enumerate(series):
        try:
            git(tree, "am", "-q", "-3", "--keep-cr", "--no-scissors", str((patches / patch.name).resolve()))
        except PatchError as error:
            rest = " ".join(str(patches / later.name) for later in series[number + 1 :])
            raise PatchError(
                f"{error}\n{patch.name}: conflict in {tree}. Resolve it there, then `git am --continue`"
                + (f" and `git am -3 --keep-cr {rest}`" if rest else "")
                + ", then `patchctl.py export TREE --new-hash`"
            ) from error


def stats(patches: Path = HERE) -> dict[str, int]:
    """Number of patches, added and deleted lines, and upstream files touched."""
    series = load_patches(patches)
    files = {path for patch in series for path in patch.files}
    added, deleted = (sum(getattr(patch, key) for patch in series) for key in ("added", "deleted"))
    return {"patches": len(series), "added": added, "deleted": deleted, "files": len(files)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="patchctl.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--patches", type=Path, default=HERE, help="folder with UPSTREAM, series and patches (default: this script's)"
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=function.__doc__.split("\n")[0], description=function.__doc__)

    sub = command("fetch", fetch)
    sub.add_argument("cache", type=Path)
    sub.add_argument("--source", type=Path)
    command("verify", verify).add_argument("tree", type=Path)
    sub = command("apply", apply)
    sub.add_argument("src", type=Path)
    sub.add_argument("dst", type=Path)
    sub.add_argument("--stock", action="store_true", help="apply the backports only")
    sub = command("export", export)
    sub.add_argument("tree", type=Path)
    sub.add_argument(
        "--new-hash", action="store_true", help="write the hashes of the stock and the patched tree into UPSTREAM"
    )
    sub = command("rebase", rebase)
    sub.add_argument("tree", type=Path)
    sub.add_argument("--old", type=Path, help="clean tree that the patches were made for")
    command("stats", stats).add_argument("--check", action="store_true", help=f"fail above {BUDGET}")
    args = parser.parse_args(argv)
    try:
        if args.command == "fetch":
            print(fetch(args.cache, args.source, args.patches))
        elif args.command == "verify":
            count = len(verify(args.tree, args.patches))
            print(f"ok: {count} patches, patched tree {read_upstream(args.patches)['patched_tree']}")
        elif args.command == "apply":
            print(f"{args.dst}: {apply(args.src, args.dst, args.patches, args.stock)} files changed")
        elif args.command == "export":
            print("\n".join(export(args.tree, args.patches, args.new_hash)))
        elif args.command == "rebase":
            rebase(args.tree, args.patches, args.old)
        else:
            total = stats(args.patches)
            for p in load_patches(args.patches):
                print(f"{p.name:28} +{p.added:<4} -{p.deleted:<4} {p.fields['Kind']:9} {' '.join(p.files)}")
            print(" ".join(f"{key} {value}" for key, value in total.items()))
            over = [
                f"{key}: expected at most {most}, got {total[key]}" for key, most in BUDGET.items() if total[key] > most
            ]
            if args.check and over:
                raise PatchError(
                    f"patches above the budget ({'; '.join(over)}); "
                    "move code into native/, or raise it with a reason in README.md"
                )
    except PatchError as error:
        print(f"patchctl: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
