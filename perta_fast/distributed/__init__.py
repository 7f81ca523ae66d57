"""One run done by many processes, on torch.distributed: who they are, and what each is dealt."""
