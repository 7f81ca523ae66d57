"""Many settings scored from one importance pass, on a live model or layer by layer; a stopped sweep can be resumed."""
