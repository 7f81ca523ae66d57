"""Pages that lie outside docs/, under the links that they have in the repository."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "bench/RESULTS.md")


def on_files(files: Files, config: Any) -> Files:
    """Add them, at the place that they would have if docs/ were the top."""
    top = Path(config.config_file_path).parent
    for name in _PAGES:
        files.append(File.generated(config, name, abs_src_path=str(top / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ and into it: the site has one top."""
    if not page.file.src_uri.startswith("guides/"):  # from there, .. leads to docs/ itself
        markdown = markdown.replace("](../", "](")
    return markdown.replace("](docs/", "](")
