"""θ_f: a base tuned on the forget data alone, by transformers' Trainer and peft's adapters."""
