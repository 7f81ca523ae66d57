"""What a model has forgotten and what it has kept: TOFU, MUSE, or a user's own data."""
