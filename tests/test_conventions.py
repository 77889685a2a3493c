"""Conventions of other projects: foolbox's model zoo and robustml's description of a claim."""

import os
import subprocess
import sys
from pathlib import Path

import foolbox as fb
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_foolbox_zoo_loads_the_model(monkeypatch, digits):
    from foolbox.zoo.model_loader import ModelLoader

    monkeypatch.setattr(sys, "path", list(sys.path))  # the loader changes it
    model = ModelLoader.get().load(str(ROOT), name="cnn", device="cpu")
    assert isinstance(model, fb.PyTorchModel)
    assert model.bounds == (0, 1)
    assert fb.accuracy(model, digits.images, digits.labels) > 0.9
    with pytest.raises(ValueError, match="unknown model 'resnet'"):
        sys.modules["foolbox_model"].create("resnet")


def test_foolbox_zoo_clones_the_repository(tmp_path):
    """What a user of the zoo does, with the committed files, as if the package were not installed."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository here to clone")
    program = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "abs_defense" else find(name, *rest)
import foolbox
model = foolbox.zoo.get_model("file://{ROOT}", name="cnn", device="cpu")
import abs_defense
print(model.bounds, abs_defense.__file__)
"""
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"lower=0, upper=1) {tmp_path}" in done.stdout


@pytest.fixture
def claim(monkeypatch):
    pytest.importorskip("robustml", reason="needs pip install --no-deps robustml")
    monkeypatch.syspath_prepend(str(ROOT))
    import robustml_model

    return robustml_model


def test_robustml_describes_the_claim(claim):
    model = claim.ABSModel("cnn")
    assert model.dataset.shape == (28, 28)
    assert model.dataset.labels == 10
    assert (model.threat_model.p, model.threat_model.epsilon, model.threat_model.targeted) == (2, 1.5, False)
    assert claim.CLAIM["claimed accuracy"] == 0.80


def test_robustml_evaluates_the_claim(claim, digits):
    import robustml

    class Digits(robustml.provider.Provider):
        def provides(self, dataset):
            return isinstance(dataset, robustml.dataset.MNIST)

        def __len__(self):
            return len(digits)

        def __getitem__(self, index):
            return digits.images[index, 0].numpy(), int(digits.labels[index])

    class Gradient(robustml.attack.Attack):
        """A step of the given length along the gradient, as white-box attacks do."""

        def __init__(self, model, length):
            self.model, self.length = model, length

        def run(self, x, y, target):
            assert target is None
            image = torch.from_numpy(x)[None, None].requires_grad_()
            loss = torch.nn.functional.cross_entropy(self.model.model(image), torch.tensor([y]))
            (gradient,) = torch.autograd.grad(loss, image)
            return np.clip(x + self.length * (gradient / gradient.norm())[0, 0].numpy(), 0, 1)

    model = claim.ABSModel("cnn")
    rates = [
        robustml.evaluate.evaluate(model, Gradient(model, length), Digits(), start=0, end=20) for length in (0, 1.5, 9)
    ]
    assert rates[0] <= 0.1
    assert rates[1] > rates[0]
    assert rates[2] == 0  # outside the threat model
