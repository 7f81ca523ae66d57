"""Quantised checkpoints: recognised, and refused with the command that converts them to float weights.

The layouts are those that transformers 5 loads (``serialized_names`` in its quantizers). Without this check a
subtraction would run on them: the integers look like counters, and the scales look like weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perta_fast.checkpoints.advice import conversion_command
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.configuration import check_configured, read_config
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.errors import InputError

# Endings of names that only a quantised checkpoint has, and its method.
_ENDINGS = {
    ".weight_scale_inv": "fp8",
    ".weight_packed": "compressed-tensors",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".g_idx": "gptq",
    ".qweight": "gptq or awq",
    "_proj_blocks": "mxfp4",
    ".W_q": "hqq",
    "_weight_qdata": "torchao",
}
_FLOAT8, _SCALED_FLOAT8 = "float8 without scales", "float8 with scales"


@dataclass(frozen=True)
class _Undoing:
    """How transformers undoes a method: arguments of from_pretrained, a call on the model, needed packages."""

    arguments: str = "dtype='auto'"
    call: str = ""
    packages: str = ""


# By method. Transformers cannot undo any other.
_UNDOING = {
    "fp8": _Undoing("quantization_config=t.FineGrainedFP8Config(dequantize=True)", packages="accelerate"),
    "mxfp8": _Undoing("quantization_config=t.FineGrainedFP8Config(dequantize=True)", packages="accelerate"),
    "mxfp4": _Undoing("quantization_config=t.Mxfp4Config(dequantize=True)"),
    "compressed-tensors": _Undoing(
        "quantization_config=t.CompressedTensorsConfig(dequantize=True)", packages="compressed-tensors"
    ),
    "metal": _Undoing("quantization_config=t.MetalConfig(dequantize=True)"),
    "bitsandbytes": _Undoing(call=".dequantize()", packages="accelerate bitsandbytes"),
    "higgs": _Undoing(call=".dequantize()", packages="accelerate flute-kernel fast_hadamard_transform"),
    _FLOAT8: _Undoing("dtype='float32'"),
}


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint is quantised: the method as transformers names it, what shows it, and what to do."""

    method: str
    places: str
    advice: str

    @classmethod
    def of(cls, path: Path, tensors: Mapping[str, TensorEntry]) -> "Quantisation | None":
        """That of the checkpoint in ``path`` with these tensors; None if its weights are plain."""
        configured, shown = _configured(path), _shown(tensors)
        if configured is None and shown is None:
            return None
        method, places = configured or "", []
        if configured is not None:
            places.append(f"quantization_config in {path / 'config.json'}")
        if shown is not None:
            method = method or shown[0]
            places.append(f"tensor {shown[1].name} ({shown[1].dtype}) in {shown[1].path}")
        advice = _advice(path, method)
        if tensors and shown is None:
            advice = f"If these tensors are plain all the same, remove quantization_config. {advice}"
        return cls(method, " and ".join(places), advice)


def open_plain(path: str | Path) -> Checkpoint:
    """``Checkpoint.open`` for arithmetic: raises InputError if it is quantised, or its configuration is damaged."""
    checkpoint = Checkpoint.open(path)
    refuse_quantised(checkpoint.path, checkpoint.tensors)
    return checkpoint


def open_loadable(path: str | Path) -> Checkpoint:
    """``open_plain`` for transformers to load: raises InputError, too, if it has no configuration."""
    checkpoint = open_plain(path)
    check_configured(checkpoint.path)
    return checkpoint


def refuse_quantised(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Raise InputError, saying what to do, if the checkpoint in ``path`` is quantised."""
    quantisation = Quantisation.of(path, tensors)
    if quantisation is not None:
        what = f"{quantisation.method}: {quantisation.places}"
        raise InputError(f"{path}: is quantised ({what}). {quantisation.advice}")


def refuse_quantised_module(module: object) -> None:
    """Raise InputError if transformers has loaded this module with quantised weights."""
    if getattr(module, "is_quantized", False):
        method = getattr(module, "quantization_method", "by transformers")
        raise InputError(f"the module is quantised ({method}), its weights are not plain; load it dequantised")


def _configured(path: Path) -> str | None:
    """The method that config.json names."""
    config = read_config(path) or {}
    for table in (config, config.get("text_config")):
        settings = table.get("quantization_config") if isinstance(table, dict) else None
        if isinstance(settings, dict) and settings:
            return str(settings.get("quant_method") or "a method without a name")
    return None


def _shown(tensors: Mapping[str, TensorEntry]) -> tuple[str, TensorEntry] | None:
    """The method that the tensors show, and a tensor that shows it."""
    for name, entry in tensors.items():
        for ending, method in _ENDINGS.items():
            if name.endswith(ending):
                return method, entry
    for entry in tensors.values():
        if entry.dtype.startswith("F8_"):
            scaled = any("scale" in name for name in tensors)
            return _SCALED_FLOAT8 if scaled else _FLOAT8, entry
    return None


def _advice(path: Path, method: str) -> str:
    undoing = _UNDOING.get(method)
    if undoing is None:
        return "transformers cannot undo that; give the checkpoint from before it was quantised"
    install = f"pip install {undoing.packages} && " if undoing.packages else ""
    command = install + conversion_command(path, undoing.arguments, undoing.call)
    if method == _FLOAT8:
        return f"As float32 it has the same values; save it so with: {command}"
    return f"Give the checkpoint from before it was quantised if you can; this one is dequantised with: {command}"
