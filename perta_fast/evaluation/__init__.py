"""What a model has forgotten and kept, measured on TOFU, MUSE or a user's own data."""
