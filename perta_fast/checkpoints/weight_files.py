"""Files that may hold the weights of a model, told by their names."""

import re
from pathlib import Path

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
OTHER_WEIGHTS = (".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ggml", ".npz", ".distcp", ".nemo", ".tflite")
_OF_OTHER_PROGRAMS = (
    ".ot",
    ".pkl",
    ".npy",
    ".pb",
    ".keras",
    ".mlmodel",
    ".mlpackage",
    ".llamafile",
    ".litertlm",
    ".engine",
)
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".zst", ".gz")
_WEIGHTS = frozenset((".safetensors", *_PICKLED, *OTHER_WEIGHTS, *_OF_OTHER_PROGRAMS, *_ARCHIVES))
# As in model.safetensors.index.json.
_ABOUT_WEIGHTS = (".json", ".md", ".md5", ".sha256", ".txt", ".py", ".metadata", ".lock")
# What trainers and this package leave beside a model: no values of its weights.
_NO_MODEL = re.compile(
    r"(training_args|optimizer|scheduler|sampler|scaler|rng_state|importance)\b.*|rng_state_\d+\.pth"
)
_SHARD = re.compile(r"(.+)-(\d{1,9})-of-(\d{1,9})\.safetensors")
ADAPTER_CONFIG = "adapter_config.json"
INDEX = ".index.json"  # how the name of an index ends, after that of the file that its shards stand for


def shard_number(name: str, stem: str = "model") -> tuple[int, int] | None:
    """Number and count of a shard of ``stem``, as in model-00001-of-00002.safetensors; None for another file."""
    match = _SHARD.fullmatch(name)
    return (int(match[2]), int(match[3])) if match is not None and match[1] == stem else None


def is_weights(name: str) -> bool:
    """Whether a file's name is one of weights, or of a copy of them that was set aside (model.safetensors.bak)."""
    lower = name.lower().rstrip("~")  # of an editor's copy
    return not lower.endswith(_ABOUT_WEIGHTS) and not _WEIGHTS.isdisjoint(Path(lower).suffixes)


def may_be_model(name: str) -> bool:
    """Whether a file may hold weights of a model, or is an index of such files or the config of an adapter."""
    return name == ADAPTER_CONFIG or (is_weights(name.removesuffix(INDEX)) and not _NO_MODEL.fullmatch(name))
