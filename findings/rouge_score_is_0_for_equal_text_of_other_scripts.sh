#!/usr/bin/env bash
# rouge-score 0.1.2, the library by which TOFU, MUSE and most summaries are scored: ROUGE of a text with itself is 0 if
# it is written in Japanese, Chinese, Russian, Arabic or Greek. Its tokenizer keeps a-z and 0-9 alone, so no token is
# left. In Latin scripts letters with accents are dropped out of the words: "père" and "pòre" are one word pair.
# So a model that recites a Japanese answer word for word reads as one that has forgotten it. No warning is given.
# Seen: rougeL 0.0 for four equal pairs, 1.0 for two texts that differ in every accented letter.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rouge-score==0.1.2 nltk==3.9.1 numpy==2.2.6 absl-py==2.3.1 six==1.17.0
"$folder/venv/bin/python" - <<'PYTHON'
from rouge_score.rouge_scorer import RougeScorer

scorer = RougeScorer(["rougeL"], use_stemmer=True)
for text in ("東京は日本の首都です", "北京是中国的首都", "Москва столица России", "Η Αθήνα είναι πρωτεύουσα"):
    score = scorer.score(text, text)["rougeL"]
    print(f"{text}: {score.fmeasure}")
    assert score.fmeasure == score.recall == 0
same = scorer.score("le père à Angoulême", "le pòre ü Angoulîme")["rougeL"].fmeasure
print(f"le père à Angoulême, le pòre ü Angoulîme: {same}")
assert same == 1
PYTHON
