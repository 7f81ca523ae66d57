"""Which adapters of peft are taken, and how, by their settings alone; and what to do with the others.

Plain LoRA is two factors for each matrix (low_rank.py). Other forms are left to peft, a module at a time, if each
module of the model can be merged alone.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perta_fast.checkpoints.advice import merge_command
from perta_fast.checkpoints.checkpoint import Checkpoint
from perta_fast.checkpoints.weight_files import ADAPTER_CONFIG
from perta_fast.checkpoints.wrappers import plain_name
from perta_fast.errors import InputError
from perta_fast.files.reading import read_json

STEM = "adapter_model"
# Settings with names of modules.
NAMING = ("alpha_pattern", "rank_pattern", "target_parameters", "trainable_token_indices")
Settings = dict[str, Any]

# Types that peft merges module by module, from that module's tensors alone, to the same bits at any number of threads;
# those that begin with a decomposition of the base (OSF, PSOFT) do not, so a run could not be resumed to the same bits.
_BY_MODULE = frozenset(
    (
        *("ADALORA", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3"),
        *("LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "PEANUT", "ROAD", "SHIRA", "SUPERTUNING"),
        *("TRAINABLE_TOKENS", "WAVEFT"),
    )
)
# Types that change what a model computes by something that is not its weights.
_NO_WEIGHTS = {
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"), "adds tokens to the text"),
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), "adds tokens to the text"),
    **dict.fromkeys(("POLY", "XLORA"), "mixes its parts anew for every text"),
    **dict.fromkeys(("BEFT", "LILY", "SHADOW"), "adds layers, which peft cannot merge"),
}
# Settings of LoRA that this package reads, or that do not change what the factors mean.
_HARMLESS = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
        *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
        *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
        *("runtime_config", "target_modules", "task_type", "use_rslora"),
    )
)
# Settings that leave all modules to peft, and those that do so with some.
_ALL_BY_PEFT = ("use_dora", "lora_bias", "use_bdlora", "monteclora_config", "velora_config")
_SOME_BY_PEFT = ("target_parameters", "trainable_token_indices")
# Settings with which the tuned model is not the base with other weights.
_NOT_OF_WEIGHTS = {
    "alora_invocation_tokens": "it is on for some tokens only",
    "arrow_config": "its parts are mixed anew for every text",
    "layer_replication": "the tuned model has more layers than its base",
    "use_qalora": "it adds to groups of inputs, which peft cannot merge",
}
# init_lora_weights that leave the base alone; that change it in the same way whenever they are loaded; and the others,
# which need what only the training had.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_REPEATED_STARTS = ("pissa", "olora")
_CONVERTED_STARTS = ("pissa", "corda", "olora", "lora_ga")
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # values of task_type
_TIED_BY_PEFT = ("embed_tokens", "lm_head")  # modules that ensure_weight_tying knows
_MERGE_LIVE = (
    "merge and save the model that was tuned while it is in memory (merge_and_unload, then save_pretrained), and give "
    "that checkpoint"
)


def read_settings(path: Path, base: Path | None) -> Settings:
    """The settings of the adapter in ``path``.

    base: the checkpoint to merge with, for advice. Raises InputError for an adapter that is not taken, with the reason
    and what to do.
    """
    file = path / ADAPTER_CONFIG
    settings, patterns = read_json(file), ("alpha_pattern", "rank_pattern")
    if isinstance(settings, dict) and {"lora_parameters", "fine_tune_type"} & settings.keys():
        raise InputError(
            f"{path}: an adapter of MLX, not of peft; fuse it and give the fused checkpoint: "
            f"{_fuse_command(path, base, settings)}"
        )
    if (
        not isinstance(settings, dict)
        or not all(isinstance(settings.get(name) or {}, dict) for name in patterns)
        or not isinstance(settings.get("peft_type"), str | None)
        or not isinstance(settings.get("target_parameters"), list | None)
    ):
        raise InputError(f"{file}: is not the config of an adapter")
    settings = with_plain_names(settings)
    kind = str(settings.get("peft_type"))  # a damaged file may hold anything
    if kind in _NO_WEIGHTS:
        raise InputError(
            f"{file}: an adapter of type {kind}, which {_NO_WEIGHTS[kind]}: it is no change of weights, so nothing "
            "can be subtracted; tune the base again with LoRA or as a whole, for example with: perta tune"
        )
    if kind == "LORA":
        _check_lora(file, settings, merge_first(path, base, settings))
    elif kind == "ADAMSS":
        raise InputError(
            f"{file}: an adapter of type {kind}: loading it finds clusters anew, which depend on the number of threads"
            f", so merging it now may give another model; {_MERGE_LIVE}"
        )
    elif kind not in _BY_MODULE:
        raise InputError(f"{file}: an adapter of type {kind}, not LORA; {merge_first(path, base, settings)}")
    return settings


def _check_lora(file: Path, settings: Settings, advice: str) -> None:
    for name, why in _NOT_OF_WEIGHTS.items():
        if settings.get(name):
            raise InputError(f"{file}: {name}: {why}, so no task vector leads from base to it; tune again without it")
    _check_start(file, settings.get("init_lora_weights"), advice)
    for name, value in settings.items():
        if value and name not in _HARMLESS and name not in (*_ALL_BY_PEFT, *_SOME_BY_PEFT):
            raise InputError(f"{file}: setting {name} is not understood here; {advice}")


def with_plain_names(settings: Settings) -> Settings:
    """The settings with names of modules as ``plain_name`` has them."""
    return settings | {name: _plain(settings[name]) for name in NAMING if settings.get(name)}


def _plain(setting: Any) -> Any:
    """A setting with names as ``plain_name`` has them."""
    if isinstance(setting, dict):
        return {plain_name(name): value for name, value in setting.items()}
    if isinstance(setting, list):
        return [plain_name(name) if isinstance(name, str) else name for name in setting]
    return setting


def _check_start(file: Path, start: Any, advice: str) -> None:
    if start in _PLAIN_STARTS:
        return
    why = f"{file}: init_lora_weights {start!r} changes the base model too"
    known = str(start).lower()
    if known in _REPEATED_STARTS:
        raise InputError(f"{why}; {advice}")
    convert = (
        "save the adapter again as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion, the "
        "adapter as it was before training), or "
        if known.startswith(_CONVERTED_STARTS)
        else ""
    )
    raise InputError(
        f"{why}, and loading it again does not repeat that, so merging it now gives another model; "
        f"{convert}{_MERGE_LIVE}"
    )


def all_by_peft(settings: Settings) -> bool:
    """Whether every module that the adapter changes is left to peft."""
    return settings.get("peft_type") != "LORA" or any(settings.get(name) for name in _ALL_BY_PEFT)


def some_by_peft(settings: Settings) -> bool:
    """Whether any module may be left to peft."""
    return all_by_peft(settings) or any(settings.get(name) for name in _SOME_BY_PEFT)


def holds_target_parameter(module: str, settings: Mapping[str, Any]) -> bool:
    """Whether a module, by path, holds a parameter that ``target_parameters`` names."""
    holders = {str(name).rpartition(".")[0] for name in settings.get("target_parameters") or ()}
    return any(module == holder or module.endswith(f".{holder}") for holder in holders)


def ties_by_name(settings: Settings, module: str, saved: bool) -> bool:
    """Whether ``ensure_weight_tying`` gave embedding and head one change, which is saved for the embedding ``module``.

    peft looks for two names alone, in modules_to_save or else in target_modules; where it finds one, it puts in the
    embedding's path. saved: whether the module is one of modules_to_save.
    """
    if not settings.get("ensure_weight_tying"):
        return False
    if saved != _names_a_tied_module(settings.get("modules_to_save"), module):
        return False
    return saved or _names_a_tied_module(settings.get("target_modules"), module)


def _names_a_tied_module(names: Any, module: str) -> bool:
    if isinstance(names, str):
        return any(re.fullmatch(names, name) for name in _TIED_BY_PEFT)
    plain = [plain_name(str(name)) for name in names or ()]
    return any(name.rpartition(".")[2] in _TIED_BY_PEFT or ("." in name and name == module) for name in plain)


def of_another_model(settings: Settings) -> str:
    """Advice on a tensor that has no place in the base."""
    task = settings.get("task_type")
    if task in _CLASSIFIERS:
        return (
            f"the adapter is of a classifier (task_type {task}), with a head of its own; give it to classifiers with "
            "that head as model and base, or tune the base as a language model"
        )
    return "give the checkpoint that the adapter was tuned from, and others of the same model"


def merge_first(path: Path, base: Path | None, settings: Mapping[str, Any]) -> str:
    """Advice to merge, with the command. Raises InputError if the adapter's tensors must be converted before that."""
    if (path / f"{STEM}.bin").exists() and not any(path.glob(f"{STEM}*.safetensors")):
        Checkpoint.open(path, STEM)
    named = str(base or settings.get("base_model_name_or_path") or "BASE")
    return f"merge it and give the merged checkpoint: {merge_command(path, named)}"


def _fuse_command(path: Path, base: Path | None, settings: Mapping[str, Any]) -> str:
    model, adapter, fused = map(shlex.quote, (str(base or settings.get("model") or "BASE"), str(path), f"{path}-fused"))
    return f"mlx_lm.fuse --model {model} --adapter-path {adapter} --save-path {fused}"
