"""The study on real language models: SmolLM2-135M-Instruct and Gemma 3 270M, from their PyPI packages.

Data flows one way: ``sources`` and ``data`` → ``models`` → ``directions`` (rules and rivals without training) and
``training_rivals`` → ``curves`` → ``afterwards`` (is it gone?) → ``tables``. Long work is divided into pieces, which
``bench.study.store`` makes once.
"""
