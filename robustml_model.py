"""The paper's claim as robust-ml.org describes one: data set, threat model, classifier (the ``robustml`` package).

The claim is the paper's (Schott et al. 2018, table 1): ABS classifies 80 % of MNIST's test images correctly under every
perturbation of at most 1.5 in L2 that its attacks found, the attacker knowing the model. It is a result of attacks, not
a proof.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import robustml
import torch

from abs_defense import load_model

CLAIM = {
    "paper": "Towards the first adversarially robust neural network model on MNIST (arXiv:1805.09190)",
    "dataset": "MNIST",
    "threat model": "L2 at most 1.5, pixels in [0, 1], untargeted, white box",
    "claimed accuracy": 0.80,
    "natural accuracy": 0.99,
    "proved": False,
}


class ABSModel(robustml.model.Model):
    """ABS with the claim of the paper: L2 at 1.5 on MNIST.

    Args:
        name: a model of ``abs_defense.load_model``.
        settings: its further arguments.

    Attributes:
        model: the torch module, for white-box attacks: ``(N, 1, 28, 28)`` in [0, 1] to logits, with gradients.
    """

    def __init__(self, name: str = "abs", **settings: Any) -> None:
        self.model = load_model(name, **settings)
        self._dataset = robustml.dataset.MNIST()
        self._threat_model = robustml.threat_model.L2(epsilon=1.5)

    @property
    def dataset(self) -> robustml.dataset.MNIST:
        """MNIST: 28x28 arrays in [0, 1]."""
        return self._dataset

    @property
    def threat_model(self) -> robustml.threat_model.L2:
        """L2 at most 1.5, untargeted."""
        return self._threat_model

    def classify(self, x: npt.NDArray[np.floating[Any]]) -> int:
        """The class of a 28x28 image in [0, 1].

        Rounding errors outside [0, 1], which robustml's threat model lets pass, are clipped.
        """
        with torch.no_grad():
            images = torch.from_numpy(np.array(x, dtype=np.float32)).reshape(1, 1, 28, 28).clamp(0, 1)
            return int(self.model(images).argmax(1))
