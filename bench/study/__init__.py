"""The TOFU study: trains small models, unlearns them by every rule and by three methods that train, and scores them.

Data flows one way: ``data`` → ``models`` → ``rules`` and ``baselines``, chosen by ``selection`` → ``main_table`` and
``analyses`` → ``tables``. All long work is divided into pieces, which ``store`` makes once.
"""
