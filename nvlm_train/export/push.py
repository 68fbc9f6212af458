"""An export to the Hugging Face Hub: `nvlm-train export --push REPO`.

Nothing leaves the machine unseen: what goes where and how large it is stands on the screen before anybody is asked, and
without a terminal only `--yes` stands for an answer. Repositories are private unless `--public` says otherwise.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_train.errors import CheckpointError, SetupError
from nvlm_train.export import licence

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_KEPT = (".gitattributes",)  # files of a repository that no export brings


@dataclass(frozen=True)
class Target:
    """Where a push goes. yes: nobody is asked."""

    repo: str
    public: bool = False
    yes: bool = False

    @property
    def visibility(self) -> str:
        return "PUBLIC" if self.public else "private"


def open_hub(target: Target, asks: bool | None = None) -> Any:
    """The Hub's client, opened before an export of hours is made.

    asks: whether somebody can be asked; None: if there is a terminal.
    Raises SetupError where a push could not work: no huggingface_hub, no token, offline, nobody to confirm it.
    """
    if not _REPO.fullmatch(target.repo):
        raise SetupError(f"--push {target.repo}: is no repository; write ORGANISATION/NAME")
    try:  # before transformers is told to stay offline while it verifies
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise SetupError("--push needs huggingface_hub, which is not installed: pip install huggingface_hub") from None
    if constants.HF_HUB_OFFLINE:
        raise SetupError("--push: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so the Hub is not asked; unset it")
    if huggingface_hub.get_token() is None:
        raise SetupError(
            "--push: there is no token of the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN to one that may "
            f"write to {target.repo}"
        )
    if not target.yes and not (sys.stdin.isatty() if asks is None else asks):
        raise SetupError("--push: there is no terminal to confirm it on; add --yes to push without being asked")
    return huggingface_hub.HfApi()


def push(
    folder: Path,
    target: Target,
    api: Any,
    ask: Callable[[str], str] | None = None,
    say: Callable[[str], Any] | None = None,
) -> dict[str, Any] | None:
    """Uploads a complete, verified export in one commit; says before what it does. None: the answer was no.

    Files of the repository that the export does not have are removed in the same commit, and named before. Returns
    repo, url, private, files and bytes. Raises CheckpointError for a folder that is no complete export or must not be
    passed on, SetupError where the Hub refuses. ask, say: default the terminal, on stderr.
    """
    ask, say = ask or _ask, say or _say
    _require_fit(folder, target)
    record = licence.read_record(folder)
    there = _there(api, target)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    names = [path.name for path in files]
    total = sum(path.stat().st_size for path in files)
    stale = sorted(set(there or ()) - {*_KEPT, *names})
    where = "a new repository" if there is None else f"a repository of {len(there)} files"
    say(f"push {folder} -> https://huggingface.co/{target.repo} ({target.visibility}, {where})")
    say(f"  licence: {record.warning() or record.label or 'not stated'}")
    for path in files:
        say(f"  {path.stat().st_size:>16,}  {path.name}" + ("  (replaced)" if path.name in (there or ()) else ""))
    for name in stale:
        say(f"  {'removed':>16}  {name}")
    say(f"  {total:>16,}  bytes in {len(files)} files")
    question = f"Upload to {target.repo} ({target.visibility})? [y/N] "
    if not target.yes and ask(question).strip().lower() not in ("y", "yes"):
        say("nothing was uploaded")
        return None
    try:
        if there is None:
            api.create_repo(target.repo, private=not target.public, repo_type="model")
        done = api.upload_folder(
            repo_id=target.repo,
            repo_type="model",
            folder_path=folder,
            allow_patterns=names,
            delete_patterns=stale or None,
            commit_message=f"Export of {record.run_name}, step {record.step}",
        )
    except Exception as error:  # network, permissions, quota: the library raises its own for each
        raise SetupError(
            f"the upload of {folder} to {target.repo} failed: {type(error).__name__}: {error}; the export is complete, "
            "and the same command verifies it and tries again"
        ) from error
    url = str(getattr(done, "commit_url", None) or f"https://huggingface.co/{target.repo}")
    say(f"pushed {total / 1e6:.1f} MB to {url}")
    return {"repo": target.repo, "url": url, "private": not target.public, "files": len(files), "bytes": total}


def _require_fit(folder: Path, target: Target) -> None:
    """Raises CheckpointError for an export that must not be passed on, or not to everybody."""
    problems = licence.problems_of(folder, passed_on=True)
    if not problems and target.public:
        record = licence.read_record(folder)
        problems += [
            f"the licence of {part.key} is unknown, so these weights are not made public; push without --public"
            for part in record.unknown
        ]
        problems += [
            f"{part.key} is under {named}, which does not allow to pass on what was made from it"
            for part in record.parts
            for named, condition in licence.demands(part)
            if condition == "no-derivatives"
        ]
        problems += licence.lacking_in(folder, record)
    if problems:
        raise CheckpointError(f"{folder} is not pushed:\n  " + "\n  ".join(problems))


def _there(api: Any, target: Target) -> list[str] | None:
    """Names of the files in the repository; None: there is none.

    Raises SetupError where it is public and nobody asked for that, or the other way round.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.repo_info(target.repo, repo_type="model")
    except RepositoryNotFoundError:
        return None
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise SetupError(f"--push: the Hub cannot be asked about {target.repo}: {what}") from error
    if not info.private and not target.public:
        raise SetupError(
            f"--push {target.repo}: exists and is public, and a push is private unless --public is given; add it, or "
            "name another repository"
        )
    if info.private and target.public:
        raise SetupError(
            f"--push {target.repo} --public: exists and is private; leave out --public, and make it public on its page "
            "when you have looked at it"
        )
    return [sibling.rfilename for sibling in info.siblings or ()]


def _ask(question: str) -> str:
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
