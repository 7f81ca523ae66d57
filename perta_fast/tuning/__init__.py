"""θ_f: a base tuned on the forget data alone, by the trainer and the adapters of others."""
