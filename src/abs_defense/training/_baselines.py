"""Training of the paper's baselines: CNN, Binary CNN, Madry et al., nearest neighbour."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import foolbox
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from abs_defense._checks import check_counts, check_positive
from abs_defense._files import require_writable_folder
from abs_defense.data import ImageSet
from abs_defense.inference import PIXELS
from abs_defense.models import (
    NEAREST_NEIGHBOR,
    Classifier,
    Network,
    compress_images,
    device_of,
    load_baseline,
    save_baseline,
    untrained_network,
)
from abs_defense.training._card import write_card
from abs_defense.training._checkpoint import load_checkpoint, save_checkpoint

_TEST_BATCH = 500


@dataclass(frozen=True)
class NetworkTraining:
    """Recipe of a network: Adam on the cross entropy, one cycle of the learning rate (Smith and Topin 2018).

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: the highest of the cycle.
        epsilon: radius of the L-infinity ball of the adversary; 0 trains on clean images.
        adversary_steps: of projected gradient descent from a random start (Madry et al. 2018); 1 is the fast method
            of Wong et al. 2020.
        adversary_step_size: of one step.
        seed: of weights, order and adversary.

    Raises:
        ValueError: a number is out of its range.
    """

    epochs: int = 6
    batch_size: int = 128
    learning_rate: float = 3e-3
    epsilon: float = 0.0
    adversary_steps: int = 10
    adversary_step_size: float = 0.06
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(epochs=self.epochs, batch_size=self.batch_size, adversary_steps=self.adversary_steps)
        check_positive(learning_rate=self.learning_rate, adversary_step_size=self.adversary_step_size)
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon: expected a number in [0, 1], got {self.epsilon}")


RECIPES = {
    "cnn": NetworkTraining(),
    "binary-cnn": NetworkTraining(),
    "madry": NetworkTraining(epochs=10, learning_rate=2e-3, epsilon=0.3, adversary_steps=3, adversary_step_size=0.15),
}


def train_network(
    name: str,
    data: ImageSet,
    out: str | Path,
    recipe: NetworkTraining | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Network:
    """Train ``"cnn"``, ``"binary-cnn"`` or ``"madry"`` and return it, frozen, on the CPU.

    ``out/checkpoint.pt`` is replaced after every epoch; a later call with the same recipe and images continues from
    it and ends with the weights of an uninterrupted run.

    Raises:
        ValueError: the images have other classes than 0 to 9, or the folder holds a checkpoint of another recipe.
        OSError: the folder cannot be written.
    """
    recipe = recipe or RECIPES[name]
    folder = require_writable_folder(out)
    model = untrained_network(name, recipe.seed).to(device)
    if data.num_classes != model.num_classes:
        raise ValueError(f"{data.name}: expected {model.num_classes} classes, got {data.num_classes}")
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    steps = max(1, len(data) // recipe.batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.epochs * steps)
    identity = {**asdict(recipe), "model": name, "images": data.sha256()}
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "cycle": cycle}
    saved = load_checkpoint(folder, identity)
    for key, part in stateful.items():
        if saved is not None:
            part.load_state_dict(saved[key])
    start = 0 if saved is None else int(saved["epochs_done"])
    with tqdm(total=recipe.epochs * steps, initial=start * steps, desc=f"training {name}", disable=not progress) as bar:
        for epoch in range(start, recipe.epochs):
            with _seeded(recipe.seed, epoch):
                order = torch.randperm(len(data))[: steps * recipe.batch_size]
                for rows in order.split(recipe.batch_size):
                    x, y = data.images[rows].to(device), data.labels[rows].to(device)
                    if recipe.epsilon:
                        x = _worst_case(model, x, y, recipe)
                    model.train()
                    loss = F.cross_entropy(model(x), y)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    cycle.step()
                    bar.update()
                bar.set_postfix(epoch=epoch, loss=f"{loss.item():.4f}")
            state: dict[str, Any] = {key: part.state_dict() for key, part in stateful.items()}
            save_checkpoint(folder, identity, {**state, "epochs_done": epoch + 1})
    return model.cpu().eval().requires_grad_(False)


def _worst_case(model: Network, x: Tensor, y: Tensor, recipe: NetworkTraining) -> Tensor:
    model.eval().requires_grad_(False)
    attack = foolbox.attacks.LinfPGD(steps=recipe.adversary_steps, abs_stepsize=recipe.adversary_step_size)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    perturbed: Tensor = attack.run(wrapped, x, foolbox.Misclassification(y), epsilon=recipe.epsilon)
    model.requires_grad_(True)
    return perturbed.detach()


@contextmanager
def _seeded(seed: int, epoch: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed * 1_000_003 + epoch)
        yield


def train_baseline(
    name: str,
    train: ImageSet,
    out: str | Path,
    recipe: NetworkTraining | None = None,
    *,
    components: int = 50,
    test: ImageSet | None = None,
    robust_images: int = 1000,
    device: str | torch.device = "cpu",
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Train a baseline and write its weights ``<name>.safetensors`` and card ``<name>.json`` into ``out``.

    Args:
        name: ``"cnn"``, ``"binary-cnn"``, ``"madry"`` or ``"nearest-neighbor"``.
        train: training images.
        out: folder; made if missing.
        recipe: of a network.
        components: principal components that the nearest neighbour keeps of the training images.
        test: if given, the accuracy on it goes into the card.
        robust_images: of an adversarially trained network, ``robust_accuracy`` on the first so many of ``test`` goes
            into the card, too; it takes 200 gradients an image.
        device: where to compute.
        command: the command line, for the card.
        progress: show progress bars.

    Returns:
        The card.

    Raises:
        ValueError: see ``train_network``; components below 1 or more than there are.
        OSError: the folder cannot be written.
    """
    folder = require_writable_folder(out)
    recipe = recipe or RECIPES.get(name)
    if name == NEAREST_NEIGHBOR:
        if not 1 <= components <= min(len(train), PIXELS):
            raise ValueError(f"components: expected 1 to {min(len(train), PIXELS)}, got {components}")
        settings: dict[str, Any] = {"images": len(train), "components": components}
        tensors = compress_images(train.images, train.labels, components)
    else:
        assert recipe is not None
        settings = asdict(recipe)
        tensors = train_network(name, train, folder, recipe, device=device, progress=progress).state_dict()
    path = folder / f"{name}.safetensors"
    save_baseline(path, name, tensors)
    model = load_baseline(name, path).to(device)
    figures: dict[str, Any] | None = None
    if test is not None:
        figures = {"images": len(test), "data": test.name, "accuracy": accuracy(model, test)}
        if recipe is not None and recipe.epsilon:
            attacked = test.head(robust_images)
            figures["robust accuracy"] = robust_accuracy(model, attacked, recipe.epsilon, progress=progress)
            figures["robust images"] = len(attacked)
            figures["attack"] = f"L-infinity PGD, epsilon {recipe.epsilon}, {_PGD}, {_RESTARTS} restarts"
    return write_card(
        path,
        command,
        name=name,
        data=train.name,
        data_sha256=train.sha256(),
        recipe=settings,
        test_figures=figures,
    )


def accuracy(model: Classifier, data: ImageSet) -> float:
    """Fraction of images classified correctly."""
    device = device_of(model)
    with torch.no_grad():
        correct = [
            model(x.to(device)).argmax(1).cpu() == y
            for x, y in zip(data.images.split(_TEST_BATCH), data.labels.split(_TEST_BATCH), strict=True)
        ]
    return torch.cat(correct).double().mean().item()


_PGD: dict[str, Any] = {"steps": 40, "abs_stepsize": 0.01}
_RESTARTS = 5


def robust_accuracy(model: Classifier, data: ImageSet, epsilon: float, *, progress: bool = True) -> float:
    """Accuracy under 40 steps of foolbox's L-infinity PGD with 5 random restarts (seed 0)."""
    device = device_of(model)
    attack = foolbox.attacks.LinfPGD(**_PGD).repeat(_RESTARTS)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
    held = 0
    with tqdm(total=len(data), desc="PGD", unit="img", disable=not progress) as bar, _seeded(0, 0):
        for x, y in zip(data.images.split(_TEST_BATCH), data.labels.split(_TEST_BATCH), strict=True):
            _, _, success = attack(wrapped, x.to(device), y.to(device), epsilons=epsilon)
            held += int((~success).sum())
            bar.update(len(x))
    return held / len(data)
