"""The TOFU study: small models trained on the spot, unlearned by every rule and by training, and scored.

Data flows one way: ``data`` → ``models`` → ``rules`` and ``baselines``, chosen by ``selection`` →
``main_table`` and ``analyses`` → ``tables``. Whatever takes long is a piece of ``store``, made once.
"""
