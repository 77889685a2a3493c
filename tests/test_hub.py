"""Folders in the format of the Hugging Face Hub: what is saved comes back, and nothing wrong is loaded. No network."""

import json
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from abs_defense import ABS, BinaryABS, load_model
from abs_defense.models import load_weights

huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs abs-defense[hub]")

SETTINGS = {"steps": 3, "lr": 0.07, "radius": 4.0, "beta": 0.5, "gradient": "unrolled", "seed": 3}


@pytest.fixture
def folder(tmp_path, small_abs):
    small_abs.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", [ABS, BinaryABS])
def test_round_trip(tmp_path, kind, random_weights, random_images):
    model = kind(random_weights(), prototypes=20, **SETTINGS)
    assert model.save_pretrained(tmp_path / "a" / "b") is None
    again = kind.from_pretrained(tmp_path / "a" / "b")
    assert type(again) is kind
    assert again.describe() == model.describe()
    assert again.weights_sha256() == model.weights_sha256()
    assert repr(again) == repr(model)
    assert not again.training
    images = random_images(3)
    assert torch.equal(again(images), model(images))


def test_fewer_classes(tmp_path, random_weights, random_images):
    model = ABS(random_weights(3), prototypes=20, steps=1)
    model.save_pretrained(tmp_path)
    assert torch.equal(ABS.from_pretrained(str(tmp_path))(random_images(2)), model(random_images(2)))


@pytest.mark.parametrize("shape", [(7, 8), (10, 7, 8)])
def test_given_prototypes_come_back_exactly(tmp_path, random_weights, shape):
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    model = ABS(random_weights(), prototypes=latents, steps=0)
    model.save_pretrained(tmp_path)
    assert torch.equal(ABS.from_pretrained(tmp_path).prototype_latents, latents)
    assert ABS.from_pretrained(tmp_path, prototypes=5).prototype_latents.shape == (5, 8)
    ABS(random_weights(), prototypes=5, steps=0).save_pretrained(tmp_path)
    assert not (tmp_path / "prototypes.safetensors").exists()


def test_settings_may_be_replaced(folder):
    model = ABS.from_pretrained(folder, steps=2, gradient="none")
    assert (model.settings.steps, model.gradient) == (2, "none")
    with pytest.raises(TypeError, match="colour"):
        ABS.from_pretrained(folder, colour=1)
    with pytest.raises(ValueError, match="steps: expected at least 0"):
        ABS.from_pretrained(folder, steps=-1)


def test_saved_in_float32(tmp_path, random_weights):
    model = ABS(random_weights(), prototypes=10, steps=1).double()
    model.save_pretrained(tmp_path)
    again = ABS.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.weights_sha256() == ABS(random_weights(), prototypes=10, steps=1).weights_sha256()


def test_weights_file_is_ours(folder, small_abs):
    loaded = load_weights(folder / "model.safetensors")
    assert_close(loaded.decoders.state_dict(), small_abs.decoders.state_dict())
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}


def test_the_other_kind_is_refused(tmp_path, folder, small_binary):
    with pytest.raises(ValueError, match=r"expected BinaryABS, got ABS: load it with ABS\.from_pretrained"):
        BinaryABS.from_pretrained(folder)
    small_binary.save_pretrained(tmp_path / "binary")
    with pytest.raises(ValueError, match="expected ABS, got BinaryABS"):
        ABS.from_pretrained(tmp_path / "binary")


def test_wrong_folders_are_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ABS.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ABS.from_pretrained("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        ABS.from_pretrained(tmp_path / "empty")
    (folder / "model.safetensors").rename(folder / "moved")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        ABS.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes((folder / "moved").read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged, truncated"):
        ABS.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, "not of an ABS model: expected format 'abs-defense/model/1', got None"),
        ({"model": "ResNet"}, "expected the model ABS or BinaryABS, got 'ResNet'"),
        ({"colour": 1}, "unknown settings colour; a newer version wrote it"),
        ({"steps": -2}, "steps: expected at least 0, got -2"),
        ({"prototypes": "prototypes.safetensors"}, r"no prototypes\.safetensors"),
    ],
)
def test_wrong_configs_are_refused(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ABS.from_pretrained(folder)


def test_prototypes_of_another_shape_are_refused(tmp_path, random_weights):
    ABS(random_weights(), prototypes=torch.zeros(2, 8), steps=0).save_pretrained(tmp_path)
    safetensors.torch.save_file({"latents": torch.zeros(2, 3)}, tmp_path / "prototypes.safetensors")
    with pytest.raises(ValueError, match=r"prototypes: expected a number or latents of shape \(K, 8\)"):
        ABS.from_pretrained(tmp_path)
    safetensors.torch.save_file({"other": torch.zeros(2, 3)}, tmp_path / "prototypes.safetensors")
    with pytest.raises(ValueError, match="no file of prototypes"):
        ABS.from_pretrained(tmp_path)


def test_the_card_is_the_hubs(folder, small_abs):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "abs-defense"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-classification"
    assert "arxiv:1805.09190" in card.data.tags
    assert card.data.eval_results is None
    assert "No test figures" in card.text
    assert small_abs.weights_sha256() in card.text
    assert "| steps | 5 |" in card.text


def test_an_edited_card_is_kept(folder, small_abs):
    (folder / "README.md").write_text("mine")
    small_abs.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_a_card_that_nobody_edited_follows_the_model(small_abs, random_weights, tmp_path):
    small_abs.save_pretrained(tmp_path)
    other = BinaryABS(random_weights(), prototypes=7, steps=1)
    other.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| prototypes | 7 |" in card
    assert "Binary ABS" in card
    (tmp_path / "README.md").write_text(card.replace("Binary", "My binary"))
    small_abs.save_pretrained(tmp_path)
    assert "My binary ABS" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("model", "accuracy"),
    [
        (lambda: load_model("prototype-abs"), "prototype-abs"),
        (lambda: ABS(steps=0, prototypes=load_weights("mnist").prototypes), None),
        (lambda: ABS(steps=0, prototypes=100), None),
        (lambda: ABS(steps=49, prototypes=100), None),
        (lambda: BinaryABS(prototypes=100), None),
    ],
    ids=["prototype-abs", "other beta", "other prototypes", "other steps", "binary, other prototypes"],
)
def test_figures_are_those_of_the_same_model_only(tmp_path, monkeypatch, model, accuracy):
    from abs_defense.models import load_card

    monkeypatch.setattr(ABS, "_decode_prototypes", lambda self: None)  # the slow part, of which the card says nothing
    model().save_pretrained(tmp_path)
    results = huggingface_hub.ModelCard.load(tmp_path / "README.md").data.eval_results
    if accuracy is None:
        assert results is None
    else:
        assert results[0].metric_value == load_card("mnist")["test_figures"][accuracy]["accuracy"]
        assert results[0].dataset_split == "test"


def test_repositories_are_found_in_the_cache(tmp_path, folder, small_abs):
    """The layout of the hub's cache, so that a repository loads without network."""
    repo = tmp_path / "cache" / "models--someone--abs"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
    model = ABS.from_pretrained("someone/abs", cache_dir=tmp_path / "cache", local_files_only=True)
    assert model.weights_sha256() == small_abs.weights_sha256()


def test_pushes_what_it_saves(monkeypatch, small_abs):
    pushed = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_):
            pushed.update({path.name: repo_id for path in folder_path.iterdir()})
            return "https://address"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert small_abs.push_to_hub("someone/abs") == "https://address"
    assert pushed == dict.fromkeys(("README.md", "config.json", "model.safetensors"), "someone/abs")


def test_other_models_are_refused():
    from abs_defense import hub

    class Mine(ABS):
        pass

    with pytest.raises(TypeError, match="expected ABS or BinaryABS, got Mine"):
        hub.save_pretrained(Mine(weights=None, prototypes=2, steps=0), "unused")


def test_the_package_needs_no_huggingface_hub():
    program = """
import sys
sys.modules["huggingface_hub"] = None
from abs_defense import ABS
try:
    ABS(weights=None, prototypes=2, steps=0).save_pretrained("unused")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'abs-defense[hub]'" in done.stdout
