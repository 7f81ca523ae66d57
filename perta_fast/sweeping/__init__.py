"""Many settings scored on a live model from one importance pass, recorded so that a stopped sweep goes on."""
