"""Many settings scored on a live model from one importance pass; a stopped sweep can be resumed."""
