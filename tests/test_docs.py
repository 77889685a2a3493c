"""Every snippet of README and docs is run or checked. Python runs as it stands, page by page, on two digits, with few
prototypes and short trainings; of commands, what they name must exist."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import abs_defense.art
import abs_defense.data
import abs_defense.training
from abs_defense import ABS
from abs_defense.benchmark import AttackSpec, ModelSpec
from abs_defense.training import VAETraining

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHECKED = {"python", "bash", "toml"}
NOT_CODE = {"text", "mermaid"}
PARTS = ("attacks", "benchmark", "certificates", "data", "models", "training")
MODULES = ("abs_defense", *(f"abs_defense.{part}" for part in PARTS))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Pages and examples that need an extra: the module that tells, and the extra.
NEEDS = {
    "other-libraries.md": ("huggingface_hub", "hub"),
    "attack_with_autoattack.py": ("pyautoattack", "third-party"),
}


def _skip_without(needed):
    if needed is not None:
        pytest.importorskip(needed[0], reason=f"needs abs-defense[{needed[1]}]")


def snippets(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands():
    """Each command of each line of shell, in words."""
    for page in PAGES:
        for block in snippets(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    words = shlex.split(command, comments=True)
                    if words:
                        yield page, words


@pytest.fixture
def in_small(monkeypatch, digits, tmp_path):
    """A 2 and a 1, and models that answer at once, for the snippets, which write into an empty folder."""
    few = abs_defense.data.ImageSet(digits.images[[1, 5]], digits.labels[[1, 5]], "two digits")
    monkeypatch.setattr(abs_defense.data, "foolbox_digits", lambda: few)
    small = {"prototypes": 200, "steps": 1}
    monkeypatch.setattr(abs_defense, "ABS", lambda *args, **kwargs: ABS(*args, **{**small, **kwargs}))
    monkeypatch.setattr(abs_defense, "load_model", lambda name: ABS(prototypes=200, steps=0))
    monkeypatch.setattr(abs_defense.art, "load_model", lambda name: ABS(prototypes=200, steps=0))
    monkeypatch.setattr(abs_defense.training, "VAETraining", lambda **kwargs: VAETraining(**{**kwargs, "epochs": 12}))
    monkeypatch.chdir(tmp_path)


@pytest.mark.touches_random_state
@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.name)
def test_snippets_run(page, in_small):
    _skip_without(NEEDS.get(page.name))
    namespace = {}
    for number, code in enumerate(snippets(page), start=1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), namespace)
    for value in namespace.values():
        assert not isinstance(value, torch.Tensor) or torch.isfinite(value.double()).all()


def test_every_snippet_is_run_or_checked():
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
        assert set(fences[::2]) <= CHECKED | NOT_CODE, page
        assert not any(fences[1::2]), page
        assert all(len(snippets(page, language)) == fences[::2].count(language) for language in CHECKED), page


def test_commands_of_the_docs_exist():
    """Of each command: its subcommands and options, the script, or the extra that it names."""
    import typer

    from abs_defense.cli import app

    root = typer.main.get_command(app)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ours = 0
    for page, (program, *words) in commands():
        where = f"{page.name}: {program} {' '.join(words)}"
        if program == "uv":
            program, *words = words
        if program == "abs-defense":
            ours += 1
            current = root
            while words and words[0] in getattr(current, "commands", {}):
                current = current.commands[words.pop(0)]
            known = {name for parameter in current.params for name in (*parameter.opts, *parameter.secondary_opts)}
            assert {word for word in words if word.startswith("--")} <= known | {"--help"}, where
        elif program == "python":
            assert words == ["-m", "pytest"] or (ROOT / words[0]).is_file(), where
        elif program == "pip":
            assert words[0] == "install", where
            named = re.search(r"\[(.*)\]", " ".join(words))
            assert named is None or set(named[1].split(",")) <= set(extras), where
        else:
            assert [program, *words] == ["mkdocs", "serve"], where
    assert ours > 20


def test_toml_of_the_docs_fits():
    for page in PAGES:
        for text in snippets(page, "toml"):
            tables = tomllib.loads(text)
            assert tables.keys() <= {"models", "attacks"}
            for kind, entries in {ModelSpec: tables.get("models", []), AttackSpec: tables.get("attacks", [])}.items():
                assert all(kind(**entry).factory for entry in entries)


def test_scripts_named_in_the_docs_exist():
    named = [name for page in PAGES for name in re.findall(r"(?:examples|benchmarks)/\w+\.py", page.read_text())]
    assert {Path(name).name for name in named} >= {path.name for path in EXAMPLES}
    assert all((ROOT / name).is_file() for name in named)


def test_reference_has_every_public_name(tmp_path):
    """Built by mkdocs, in a process of its own; skipped only where the docs extra is missing."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text = "".join(path.read_text() for path in (tmp_path / "reference").glob("*.html"))
    headings = " ".join(re.findall(r"<h[2-4].*?</h[2-4]>", text, re.DOTALL))
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            is_constant = not inspect.isclass(getattr(module, name)) and not inspect.isfunction(getattr(module, name))
            assert is_constant or re.search(rf"\b{name}\b", headings), f"{module.__name__}.{name}"


def test_links_inside_the_repository_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http", "mailto")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_run_and_write_a_picture(example, tmp_path):
    _skip_without(NEEDS.get(example.name))
    result = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    pictures = list(tmp_path.rglob("*.png"))
    assert pictures
    assert all(path.stat().st_size > 5000 for path in pictures)
