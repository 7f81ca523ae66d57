"""Per-parameter importance: estimated on data, kept as safetensors shards."""
