"""The paper's Latent Descent attack (section 4.3)."""

from __future__ import annotations

import eagerpy as ep
import torch
from foolbox.criteria import Criterion
from foolbox.distances import l2
from foolbox.models import Model
from torch import Tensor

from abs_defense._checks import check_counts, check_positive
from abs_defense.attacks._base import ContractAttack
from abs_defense.attacks._insight import Goal, Insight, active, bisect, per_image
from abs_defense.inference import Observation


class LatentDescentAttack(ContractAttack):
    """Walk towards the reconstruction of the best other class (Schott et al. 2018, section 4.3). L2.

    At the current image ``x_t`` every class is inferred; ``r`` is the reconstruction ``G_c(z*)`` of the most likely
    class c that is not the true one (targeted: of the target); ``x_{t+1} = (1 - stepsize) x_t + stepsize r`` until
    the image is adversarial. Then one binary search within the last step, and another between the original image
    and the result.

    For Binary ABS, r is projected first: pixels on which r and the original agree after binarisation keep the
    original's value, the others go just across the threshold. Steps that flip no pixel leave what the model sees
    unchanged and cost no query.

    Works on every foolbox model with ABS or Binary ABS inside, however deep, that calls it once with each image, if the
    preprocessing is an affine map of each pixel: it listens to the model during the call. (``torch.nn.DataParallel``
    calls it in other threads, where it cannot be heard.)

    Args:
        stepsize: epsilon of the paper, relative to the way that is left.
        steps: the most steps; images that are not adversarial by then fail.
        binary_search_steps: of each of the two searches.
        margin: how far across the threshold pixels go, in the model's units (Binary ABS).

    Raises:
        ValueError: a setting is out of its range; at the call, if there is no ABS inside the model, the criterion is
            neither ``Misclassification`` nor ``TargetedMisclassification``, or the input is not what the model takes.
    """

    distance = l2

    def __init__(
        self, *, stepsize: float = 0.01, steps: int = 1000, binary_search_steps: int = 10, margin: float = 1e-3
    ) -> None:
        if not 0 < stepsize <= 1:
            raise ValueError(f"stepsize: expected a number in (0, 1], got {stepsize}")
        check_counts(steps=steps)
        check_counts(0, binary_search_steps=binary_search_steps)
        check_positive(margin=margin)
        self.stepsize = stepsize
        self.steps = steps
        self.binary_search_steps = binary_search_steps
        self.margin = margin

    def _perturb(self, model: Model, x: ep.Tensor, criterion: Criterion, early_stop: float | None) -> ep.Tensor:
        goal = Goal.of(criterion, self)
        insight = Insight(model, criterion, x)
        original: Tensor = x.raw.detach()
        result = original.clone()

        rows = per_image(active(insight.clean), original)
        inner, outer, found = self._walk(insight, goal, original, rows)
        inner, outer = bisect(insight, inner, outer, found, self.binary_search_steps)
        result[found] = outer
        if early_stop is not None:
            far = (outer - original[found]).flatten(1).norm(dim=1) > early_stop
            found, outer = found[far], outer[far]
        _, outer = bisect(insight, original[found], outer, found, self.binary_search_steps)
        result[found] = outer
        return ep.astensor(result)

    def _walk(self, insight: Insight, goal: Goal, original: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last image before and the first after the boundary, and whose they are."""
        current = original[rows]
        destination = self._destination(insight, goal, insight.clean_observation, original, rows, rows)
        befores, afters, founds = [current[:0]], [current[:0]], [rows[:0]]
        for _ in range(self.steps):
            if not len(rows):
                break
            following = (1.0 - self.stepsize) * current + self.stepsize * destination
            changed = self._changed(insight, current, following)
            hit = torch.zeros_like(changed)
            if changed.any():
                asked = changed.nonzero()[:, 0]
                flags, observation = insight(following[asked], rows[asked])
                hit[asked] = per_image(flags, hit)
                everyone = torch.arange(len(asked), device=rows.device)
                destination[asked] = self._destination(insight, goal, observation, original, rows[asked], everyone)
            befores.append(current[hit])
            afters.append(following[hit])
            founds.append(rows[hit])
            current, destination, rows = following[~hit], destination[~hit], rows[~hit]
        return torch.cat(befores), torch.cat(afters), torch.cat(founds)

    def _destination(
        self, insight: Insight, goal: Goal, observation: Observation, original: Tensor, rows: Tensor, heard: Tensor
    ) -> Tensor:
        """r for the images ``rows`` of the batch, which are the images ``heard`` of the observation."""
        rivals = goal.rivals(observation.inference.energy[heard], rows)
        reconstruction = observation.inference.reconstructions[heard, rivals].to(original.dtype)
        threshold = observation.threshold
        if threshold is not None:
            image = insight.to_model(original[rows])
            wanted = reconstruction > threshold
            margin = insight.representable(self.margin)
            across = torch.where(wanted, threshold + margin, threshold - margin)
            reconstruction = torch.where(wanted == (image > threshold), image, across)
        return insight.from_model(reconstruction, original[rows])

    def _changed(self, insight: Insight, before: Tensor, after: Tensor) -> Tensor:
        """Which images the model sees differently, ``(N,)``."""
        threshold = insight.clean_observation.threshold
        if threshold is None:
            return torch.ones(len(before), dtype=torch.bool, device=before.device)
        return ((insight.to_model(before) > threshold) != (insight.to_model(after) > threshold)).flatten(1).any(1)
