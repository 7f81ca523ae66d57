"""Why a directory holds no weights that are read here, and what to do about it."""

import re
from contextlib import suppress
from pathlib import Path

from perta_fast.checkpoints.advice import conversion_command, python_command
from perta_fast.checkpoints.weight_files import ADAPTER_CONFIG, OTHER_WEIGHTS, may_be_model, shard_number
from perta_fast.errors import shell_command

_PICKLED = re.compile(r"pytorch_model.*\.bin")  # a trainer also leaves training_args.bin, optimizer.pt and the like
_VARIANT = re.compile(r"model\.(?P<one>\w+)\.safetensors|model\.safetensors\.index\.(?P<sharded>\w+)\.json")
_TRAINER_EXPORTS = "export the model as transformers saves it with the program that trained it, and give that"
# Files and directories that other programs leave, and what to do with them; tried in this order.
_OTHER_PROGRAMS = (
    (
        re.compile(r"zero_to_fp32\.py|.*_zero_pp_rank_.*|zero_pp_rank_.*|mp_rank_\d+_model_states\.pt"),
        "a checkpoint of a DeepSpeed training; join it to safetensors with the zero_to_fp32.py that DeepSpeed leaves "
        "there, copy config.json and tokenizer to the result, and give that",
    ),
    (re.compile(r"latest_checkpointed_iteration\.txt|mp_rank_\d+.*"), f"a checkpoint of Megatron; {_TRAINER_EXPORTS}"),
    (re.compile(r".+\.nemo|model_weights\.ckpt"), f"a checkpoint of NeMo; {_TRAINER_EXPORTS}"),
    (
        re.compile(r".+\.(h5|msgpack)"),
        "weights of TensorFlow or JAX; get the safetensors of the same model, and give those",
    ),
    (
        re.compile(f".+({'|'.join(map(re.escape, OTHER_WEIGHTS))})"),
        "which is for running a model, and no safetensors; give the checkpoint that it was made from",
    ),
)


def why_no_weights(path: Path, names: list[str], stem: str) -> str:
    """The message for a directory that holds neither ``stem``.safetensors nor shards of it. names: of its entries."""
    neither = f"{path}: holds neither {stem}.safetensors nor {stem}.safetensors.index.json"
    if stem == "adapter_model" and f"{stem}.bin" in names:
        return f"{path}: holds {stem}.bin, which is never loaded here; convert it with: {_convert_adapter(path, stem)}"
    if stem != "model":
        return neither
    if ADAPTER_CONFIG in names:
        return f"{path}: holds a PEFT adapter, which only tuned can be; give the whole model here"
    if pickled := sorted(filter(_PICKLED.fullmatch, names)):
        return (
            f"{path}: holds pickled weights ({pickled[0]}), which are never loaded here. If you trust them, "
            f"convert them with: {conversion_command(path)}"
        )
    if variant := next(filter(None, map(_VARIANT.fullmatch, sorted(names))), None):
        kind = variant["one"] or variant["sharded"]
        command = conversion_command(path, f"dtype='auto', variant={kind!r}")
        return f"{neither}, but {variant[0]}; save this variant as a model of its own with: {command}"
    if any(name.endswith(".distcp") for name in names):
        return (
            f"{path}: holds the shards of a training with FSDP or torch.distributed.checkpoint; join them with: "
            f"{shell_command('accelerate', 'merge-weights', path, f'{path}-merged')} (pip install accelerate), and "
            "copy config.json and tokenizer to the result"
        )
    for pattern, advice in _OTHER_PROGRAMS:
        if other := sorted(filter(pattern.fullmatch, names)):
            return f"{path}: holds {other[0]}, {advice}"
    if below := _weights_below(path):
        return f"{neither}, but directories in it hold weights: give one of these, as {below[0]}"
    if "adapter_model.safetensors" in names:
        return f"{path}: holds adapter_model.safetensors without the {ADAPTER_CONFIG} beside it; fetch that too"
    others = sorted(name for name in names if may_be_model(name))
    return f"{neither}, but {', '.join(others[:3])}; is this a model as transformers saves it?" if others else neither


def _convert_adapter(path: Path, stem: str) -> str:
    source, target = str(path / f"{stem}.bin"), str(path / f"{stem}.safetensors")
    return python_command(
        f"import torch, safetensors.torch as s; t = torch.load({source!r}, 'cpu', weights_only=True); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in t.items()}}, {target!r}, {{'format': 'pt'}})"
    )


def _weights_below(path: Path) -> list[Path]:
    """Directories in ``path``, such as checkpoint-500 or snapshots/REVISION, that hold weights; ours first."""
    marks = (ADAPTER_CONFIG, "model.safetensors", "model.safetensors.index.json")
    found = []
    for folder in (*path.glob("*"), *path.glob("snapshots/*")):
        with suppress(OSError):  # not a directory, or one that may not be read
            names = [entry.name for entry in folder.iterdir()]
            ours = any(name in marks or shard_number(name) for name in names)
            if ours or (not folder.name.startswith("optimizer") and any(map(may_be_model, names))):
                found.append((not ours, folder))
    return [folder for _, folder in sorted(found)]
