"""The files beside the weights of a checkpoint: with the weights, they decide what a model answers."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.weight_files import ADAPTER_CONFIG, INDEX, is_weights, may_be_model
from perta_fast.errors import shell_command
from perta_fast.files.own import is_own_name
from perta_fast.files.reading import check_fetched, regular_file

CARD, CONFIG = "README.md", "config.json"
TEMPLATES = "additional_chat_templates"  # the one directory beside the weights that transformers reads
_READ = (".json", ".jinja", ".py", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".bpe")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # of git, or SHA-256
TUNING = "perta_tune.json"  # what ``perta tune`` leaves beside the model that it has tuned
PRECONDITIONING = "perta_precondition.json"  # what ``perta precondition`` leaves beside the θ_f that it has made
_OF_A_RUN = ("perta_report.json", "perta_files.b3", TUNING, PRECONDITIONING)


def companions(directory: Path) -> dict[str, Path]:
    """The model card, and what transformers and tokenizers read: config, tokenizer, templates, code; by name."""
    return {
        name: path
        for name, path in files_of(directory).items()
        if name == CARD or (name.endswith(_READ) and not name.endswith(INDEX) and name not in _OF_A_RUN)
    }


def files_of(directory: Path) -> dict[str, Path]:
    """The files of ``directory`` and of its chat templates, by name relative to it; hidden ones are left out."""
    files = {}
    for folder in (directory, directory / TEMPLATES):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not path.name.startswith(".") and os.path.isfile(path):  # noqa: PTH113  (False for a link to itself)
                files[os.path.relpath(path, directory)] = path
    return files


def check_companions_fetched(directory: Path) -> None:
    """Raise InputError if one of the ``companions`` is a pointer of git-lfs: nothing could load the output."""
    for path in companions(directory).values():
        with suppress(OSError), open(path, "rb", opener=regular_file) as file:
            check_fetched(path, file.read(64))


def is_read(name: str) -> bool:
    """Whether programs that load a model may read a file of this name: other than notes and pictures."""
    return name.endswith((*_READ, ".pkl")) or is_weights(name)


def copy_companions(source: Checkpoint, target: Path) -> None:
    """Copy everything beside the weights: config, tokenizer, templates, generation config, code, the index in use.

    An adapter that lies beside the model stays behind: with its config alone, transformers would look for it in vain.
    So do links that lead elsewhere (``left_out_links``): what they lead to may be private. Shards without an index get
    one, since transformers cannot load them without.
    """
    for path in _companions(source):
        copy = target / path.relative_to(source.path)
        copy.parent.mkdir(exist_ok=True)
        if not _is_left_out(path, source):
            shutil.copyfile(path, copy)
    if source.index is None and "model.safetensors" not in source.shards:
        weight_map = {entry.stored_name or name: entry.path.name for name, entry in source.tensors.items()}
        content = {"metadata": {"total_size": source.size}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def left_out_links(source: Checkpoint) -> list[Path]:
    """The links that ``copy_companions`` leaves out. The index is none of them: it is known to name tensors."""
    return [path for path in _companions(source) if _is_left_out(path, source)]


def _companions(source: Checkpoint) -> Iterator[Path]:
    for path in sorted(source.path.iterdir()):
        kept = path == source.index or not is_weights(path.name.removesuffix(INDEX))
        if kept and path.is_file() and path.name != ADAPTER_CONFIG and not is_own_name(path.name):
            yield path
    templates = source.path / TEMPLATES
    yield from (path for path in sorted(templates.iterdir()) if path.is_file()) if templates.is_dir() else ()


def _is_left_out(path: Path, source: Checkpoint) -> bool:
    folder = path.parent  # may be a link itself, if it is that of the templates
    leads_out = elsewhere(path) is not None or (folder != source.path and elsewhere(folder) is not None)
    return path != source.index and leads_out


def elsewhere(path: Path) -> Path | None:
    """Where a link in a model's directory leads; None if it leads into the directory or the same hub cache.

    In a hub cache, HUB/NAME/snapshots/REVISION holds links to files in HUB/NAME/blobs. These may be links to a store of
    all models, HUB/blobs/XX; and each blobs may be a link itself, if it was moved to another disk. There, only files
    that are named by a hash belong to the cache.
    """
    directory, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    repositories = [above.parent for above in directory.parents if above.name == "snapshots"]
    if directory in target.parents or target.parent in [repository / "blobs" for repository in repositories]:
        return None
    stores = [repository / "blobs" for repository in repositories]
    stores += [repository.parent / "blobs" / target.name[:2] for repository in repositories]
    stored = target.parent in [Path(os.path.realpath(store)) for store in stores]
    return None if stored and _BLOB.fullmatch(target.name) else target


def left_out_warning(link: Path, final: Path) -> str:
    """What to do about a link that ``copy_companions`` left out of the output ``final``."""
    target = Path(os.path.realpath(link))
    copy = final / TEMPLATES / link.name if link.parent.name == TEMPLATES else final / link.name
    command = shell_command("cp", target, copy)
    return f"{link} is a link to {target}, outside the model's directory, and was not copied; copy it with: {command}"


def other_weights(checkpoint: Checkpoint) -> list[str]:
    """Files in the directory, and below it, that may hold the model's weights a second time, or an adapter to it.

    They are told by their names, which are relative to the directory. Links to directories are not followed.
    """
    found = []
    for folder, folders, names in os.walk(checkpoint.path):
        inside = Path(folder).relative_to(checkpoint.path)
        if inside.parts[-3:] == (".git", "lfs", "objects") and folders:  # all versions of all large files
            found.append(str(inside))
        folders[:] = sorted(name for name in folders if not name.startswith(".perta"))
        own = set() if inside.parts else {path.name for path in checkpoint.files()}
        found += [str(inside / name) for name in sorted(names) if name not in own and may_be_model(name)]
    return found + [f"old copies of tensors in {name}" for name in checkpoint.old_copies]
