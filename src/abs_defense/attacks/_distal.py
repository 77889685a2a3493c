"""Distal adversarials: who is sure of garbage? (Schott et al. 2018, section 5)"""

from __future__ import annotations

from typing import Any

import eagerpy as ep
import torch
from foolbox.attacks.base import Attack
from foolbox.criteria import TargetedMisclassification
from foolbox.models import Model
from torch import Tensor

from abs_defense._checks import check_counts, check_positive
from abs_defense.attacks._base import as_criterion, check_bounds, check_labels, query_rows
from abs_defense.inference import listen


class DistalAttack(Attack):
    """From noise, follow gradients until one class has a confidence of 90 %.

    The confidence is that of the model's ``predict_proba`` if there is ABS inside, else the softmax of its outputs.
    The gradient is that of the class's log softmax; where ABS is uniform because the offset eta outweighs all
    likelihoods, the log likelihood of the class is raised as well, up to eta. Steps have a fixed L2 length.

    Args:
        confidence: to reach.
        steps: the most gradient steps.
        stepsize: L2 length of a step, relative to the width of the bounds.

    Raises:
        ValueError: a setting is out of its range; at the call, for inputs that are not PyTorch tensors or outside the
            bounds, for criteria other than ``TargetedMisclassification`` or None, for targets that are no classes,
            and for models without gradients.
    """

    def __init__(self, *, confidence: float = 0.9, steps: int = 200, stepsize: float = 0.2) -> None:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
        check_counts(steps=steps)
        check_positive(stepsize=stepsize)
        self.confidence = confidence
        self.steps = steps
        self.stepsize = stepsize

    def repeat(self, times: int) -> DistalAttack:
        """The attack itself: it is deterministic.

        Raises:
            ValueError: ``times`` is less than 1.
        """
        check_counts(times=times)
        return self

    def __call__(  # type: ignore[override]
        self, model: Model, inputs: Any, criterion: Any = None, *, epsilons: None = None
    ) -> tuple[Any, Any, Any]:
        """Distal adversarials of noise.

        Args:
            model: PyTorch foolbox model.
            inputs: noise images.
            criterion: ``TargetedMisclassification`` with the class for each image, or None for the class that the
                model finds most likely at the start.
            epsilons: None: distal adversarials have no size.

        Returns:
            Images (twice, as foolbox's attacks do), and which reached the confidence.
        """
        x, restore_type = ep.astensor_(inputs)
        if epsilons is not None:
            raise ValueError(f"epsilons: expected None, got {epsilons}")
        if not isinstance(x, ep.PyTorchTensor):
            raise ValueError(f"inputs: expected a PyTorch tensor, got {type(x.raw).__name__}")
        check_bounds(x, model)
        images: Tensor = x.raw.detach().clone()
        fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        if criterion is not None and not isinstance(criterion, TargetedMisclassification):
            raise ValueError(f"criterion: expected TargetedMisclassification or None, got {type(criterion).__name__}")
        if len(images):
            targets = None
            if criterion is not None:
                criterion = as_criterion(criterion, x)
                check_labels(criterion, len(x))
                targets = criterion.target_classes.raw
            self._climb(model, images, targets, fooled)
        result = restore_type(ep.astensor(images))
        return result, result, restore_type(ep.astensor(fooled))

    def _climb(self, model: Model, images: Tensor, targets: Tensor | None, fooled: Tensor) -> None:
        length = self.stepsize * (model.bounds.upper - model.bounds.lower)
        for step in range(self.steps + 1):
            rows = (~fooled).nonzero()[:, 0]
            if not len(rows):
                return
            live = images[rows].requires_grad_()
            with torch.enable_grad(), listen() as heard, query_rows(rows.cpu().numpy()):
                logits = model(ep.astensor(live)).raw
            if not logits.requires_grad:
                raise ValueError("model: expected one with gradients, but its outputs have none")
            if targets is not None and not ((targets >= 0) & (targets < logits.shape[1])).all():
                raise ValueError(f"target_classes: expected classes 0 to {logits.shape[1] - 1}, got {targets.tolist()}")
            eta = heard[-1].eta if heard else 0.0
            if targets is None:
                targets = logits.detach().argmax(1)
            with torch.no_grad():
                likelihood = (logits - (0.0 if eta else logits.amax(1, keepdim=True))).exp() + eta
                confidences = likelihood / likelihood.sum(1, keepdim=True)
            fooled[rows] = confidences.gather(1, targets[rows, None])[:, 0] >= self.confidence
            if step == self.steps:
                return
            with torch.enable_grad():
                target_logits = logits.gather(1, targets[rows, None])[:, 0]
                objective = target_logits - logits.logsumexp(1)
                if eta:
                    enough = torch.tensor(eta).log() - torch.tensor(1.0 - self.confidence).log() + 2.0
                    objective = objective + (target_logits - enough.to(logits)).clamp_max(0.0)
                gradient = torch.autograd.grad(objective[~fooled[rows]].sum(), live)[0]
            norms = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
            following = (live.detach() + length * gradient / norms).clamp(*model.bounds)
            going = ~fooled[rows]
            images[rows[going]] = following[going]
