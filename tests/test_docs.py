"""The Python snippets of README and docs run as they stand, page by page, on two digits and few prototypes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import abs_defense.art
import abs_defense.data
from abs_defense import ABS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def snippets(page):
    return SNIPPET.findall(page.read_text())


@pytest.fixture
def in_small(monkeypatch, digits, tmp_path):
    """A 2 and a 1, and models that answer at once, for the snippets, which write into an empty folder."""
    few = abs_defense.data.ImageSet(digits.images[[1, 5]], digits.labels[[1, 5]], "two digits")
    monkeypatch.setattr(abs_defense.data, "foolbox_digits", lambda: few)
    small = {"prototypes": 200, "steps": 1}
    monkeypatch.setattr(abs_defense, "ABS", lambda *args, **kwargs: ABS(*args, **{**small, **kwargs}))
    monkeypatch.setattr(abs_defense, "load_model", lambda name: ABS(prototypes=200, steps=0))
    monkeypatch.setattr(abs_defense.art, "load_model", lambda name: ABS(prototypes=200, steps=0))
    monkeypatch.chdir(tmp_path)


@pytest.mark.touches_random_state
@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.name)
def test_snippets_run(page, in_small):
    namespace = {}
    for number, code in enumerate(snippets(page), start=1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), namespace)
    for value in namespace.values():
        assert not isinstance(value, torch.Tensor) or torch.isfinite(value.double()).all()


def test_commands_of_the_docs_exist():
    """Every option of every ``abs-defense`` line in README and docs is one of the command's."""
    import typer

    from abs_defense.cli import app

    command = typer.main.get_command(app)
    lines = [
        line.split("#")[0]
        for page in PAGES
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip().startswith("abs-defense ")
    ]
    assert len(lines) > 10
    for line in lines:
        words = line.split()[1:]
        current = command
        while words and words[0] in getattr(current, "commands", {}):
            current = current.commands[words.pop(0)]
        known = {name for parameter in current.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_links_inside_the_repository_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http", "mailto")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_run_and_write_a_picture(example, tmp_path):
    result = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    pictures = list(tmp_path.rglob("*.png"))
    assert pictures
    assert all(path.stat().st_size > 5000 for path in pictures)
