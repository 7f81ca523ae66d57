"""MUSE's files as its authors publish them, and what is cut from its texts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from perta_fast import Evaluation, evaluate
from perta_fast.errors import InputError
from perta_fast.evaluation.muse import read_muse
from tests.support.models import FORGET, RETAIN, llama, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [{"question": "A?", "answer": "B"}]
# Names and forms as load_data.py of github.com/swj0419/muse_bench writes them.
PUBLISHED: dict[str, list[Any]] = {
    "verbmem/forget": [{"prompt": f"{row['question']} Then", "gt": f"{row['answer']} And more."} for row in FORGET],
    "knowmem/forget_qa": list(FORGET),
    "knowmem/retain_qa": list(RETAIN),
    "knowmem/forget_qa_icl": EXAMPLES,
    "knowmem/retain_qa_icl": EXAMPLES,
    "privleak/forget": [row["answer"] for row in FORGET],
    "privleak/retain": [row["answer"] for row in RETAIN],
    "privleak/holdout": [row["question"] for row in RETAIN],
    "raw/forget": [row["answer"] for row in FORGET],
    "scal/forget_1": [row["answer"] for row in FORGET],
    "sust/forget_1": [row["answer"] for row in FORGET],
}


def publish(folder: Path, **changes: list[Any] | None) -> Path:
    """Write the files; ``changes`` by name, "__" for "/": other rows, or None for a file that is not there."""
    for name, rows in (PUBLISHED | {name.replace("__", "/"): rows for name, rows in changes.items()}).items():
        if rows is not None:
            path = folder / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(rows))
    return folder


def scored(folder: Path, **changes: Any) -> Evaluation:
    settings: dict[str, Any] = {"tokenizer": tokenizer(), "progress": False, "max_new_tokens": 4}
    return evaluate(llama(0).eval(), suite="muse", data=folder, **settings | changes)


def test_texts_and_objects_score_alike(tmp_path: Path) -> None:
    (tmp_path / "strings").mkdir()
    (tmp_path / "objects").mkdir()
    as_objects = {
        f"privleak__{role}": [{"text": text} for text in PUBLISHED[f"privleak/{role}"]]
        for role in ("forget", "holdout")
    }
    published, hub = publish(tmp_path / "strings"), publish(tmp_path / "objects", **as_objects)
    first, second = scored(published), scored(hub)
    assert first.metrics == second.metrics
    assert first.notes == []


def test_older_names(tmp_path: Path) -> None:
    """Those of the authors' first files: retain2_qa, without worked examples."""
    changes = {"knowmem__retain_qa": None, "knowmem__retain_qa_icl": None, "knowmem__retain2_qa": list(RETAIN)}
    folder = publish(tmp_path, **changes)
    result = scored(folder)
    assert "retain_knowmem_ROUGE" in result.metrics
    assert [note for note in result.notes if "retain_qa_icl is missing" in note]
    assert Path(result.data["knowmem/retain_qa"]["path"]).name == "retain2_qa.json"
    (folder / "knowmem" / "retain2_qa_icl.json").write_text(json.dumps(EXAMPLES))
    assert scored(folder).notes == []


def test_names_as_on_the_hub(tmp_path: Path) -> None:
    """A number stands before the ending, whatever the format; a file is known by what it holds."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "scripts").mkdir()
    hub, scripts = publish(tmp_path / "hub"), publish(tmp_path / "scripts")
    for path in list(hub.glob("*/*.json")):
        path.rename(path.with_name(f"{path.stem}-00000-of-00001.parquet"))
    found, expected = read_muse(hub), read_muse(scripts)
    assert {name: file.digest for name, file in found.items()} == {name: f.digest for name, f in expected.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knowmem__retain_qa": None}, "has no file knowmem/retain_qa.jsonl or knowmem/retain_qa.json"),
        ({"privleak__holdout": ["a", 3]}, "holdout.json, object 2: is not a JSON object"),
        ({"privleak__holdout": ["a", " "]}, 'holdout.json, object 2: "text" must be a text that is not empty'),
        ({"privleak__holdout": ["a", "\ud800"]}, "holdout.json, object 2: has half a character"),
        ({"privleak__holdout": []}, "holds no samples"),
        ({"knowmem__forget_qa": ["a"]}, "forget_qa.json, object 1: is not a JSON object"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_muse(publish(tmp_path, **changes))


@pytest.mark.parametrize(
    ("missing", "metrics", "needed"),
    [
        ("privleak", ["forget_verbmem_ROUGE", "*knowmem*", "memorization"], "mia_min_k needs the file privleak/forget"),
        ("privleak", ["rouge"], "privleak needs the file privleak/forget"),
        ("knowmem", ["membership", "forget_verbmem_ROUGE"], "retain_knowmem_ROUGE needs the file knowmem/retain_qa"),
        ("verbmem", ["membership"], "extraction_strength needs the file verbmem/forget"),
    ],
)
def test_chosen_metrics_do_without_other_files(tmp_path: Path, missing: str, metrics: list[str], needed: str) -> None:
    folder = publish(tmp_path)
    whole = scored(folder, metrics=metrics)
    shutil.rmtree(folder / missing)
    assert scored(folder, metrics=metrics).metrics == whole.metrics
    with pytest.raises(InputError, match=needed):
        scored(folder, metrics=[needed.split()[0]])
    with pytest.raises(InputError, match=f"has no file {missing}/"):
        scored(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(InputError, match="has no file verbmem/forget"):
        scored(folder, metrics=metrics)


def test_the_original_text_is_cut_as_muse_cuts_it(tmp_path: Path) -> None:
    """To as many tokens as are generated, of which a BOS is one, though the text does not show it."""
    plain, with_bos = tokenizer(), tokenizer()
    with_bos.add_special_tokens({"bos_token": "<pad>"})
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    ids = [plain(text["gt"])["input_ids"] for text in PUBLISHED["verbmem/forget"]]
    assert with_bos(PUBLISHED["verbmem/forget"][0]["gt"])["input_ids"] == [1, *ids[0]]
    folder = publish(tmp_path)
    for words, kept in ((plain, 5), (with_bos, 4)):
        metrics = ["forget_verbmem_ROUGE"]
        result = scored(folder, tokenizer=words, max_new_tokens=5, show_text=True, metrics=metrics)
        truth = [sample["ground_truth"] for sample in result.metrics["forget_verbmem_ROUGE"].samples]
        assert truth == [plain.decode(row[:kept]) for row in ids]
