"""The groups under which the help of a long command shows its options."""

LONG = 20  # options, from which on a command has groups
_GROUPS = {
    "inputs": (
        *("recipe", "model", "base", "tuned", "forget_importance", "retain_importance", "importance"),
        *("whole_importance", "merge", "whole", "remove", "gold", "reference", "reference_model", "against"),
        *("common_rows", "download"),
    ),
    "data": (
        *("suite", "data", "split", "forget", "retain", "also", "holdout", "fields", "show_labels", "system_prompt"),
        *("date_string", "max_length"),
    ),
    "rule and strength": (
        *("rule", "rules", "lam", "lams", "max_retain_rise", "mu", "mus", "p", "ps", "alpha", "alphas", "threshold"),
        *("estimator", "at", "only", "leave", "choose", "target_retain_loss", "max_retain_increase", "retain_floor"),
        *("up_to_base", "metric", "select"),
    ),
    "training": ("full", "rank", "epochs", "lr", "retain_kl", "seed", "gradient_checkpointing", "report_to"),
    "measuring": ("metrics", "min_k", "stress", "lm_eval", "max_new_tokens", "compatible", "check"),
    "what is kept": ("save_importance", "save_as", "importance_dtype", "save_tuned"),
    "memory and devices": (
        *("stream", "memory", "device_memory", "dry_run", "batch_size", "device", "dtype", "threads", "drop_cache"),
    ),
    "output": (
        *("out", "in_place", "checkpoint", "overwrite", "link_unchanged", "allow_zero", "leave_others"),
        *("open_unlearning_dir", "show_text", "quiet", "json"),
    ),
}
GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
TITLES = tuple(_GROUPS)
