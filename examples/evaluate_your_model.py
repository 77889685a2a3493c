"""Your own model beside ABS under a small suite; writes the report your-model/report.html with its pictures."""

import foolbox as fb
import torch
from torch import nn

from abs_defense.attacks import L2BisectorAttack
from abs_defense.benchmark import CLEAN, AttackSpec, ModelSpec, our_model, run_evaluation
from abs_defense.data import foolbox_digits


class Templates(nn.Module):
    """Any module of images in [0, 1] that returns logits: here, correlation with the sum of a few digits a class."""

    def __init__(self) -> None:
        super().__init__()
        digits = foolbox_digits()
        templates = torch.stack([digits.images[digits.labels == c].flatten(1).sum(0) for c in range(10)])
        length = templates.norm(dim=1, keepdim=True).clamp_min(1e-6)  # there is no 8 among the twenty
        self.weight = nn.Parameter(templates / length, requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


models = [ModelSpec("templates", Templates), our_model("prototype-abs"), our_model("cnn")]
suite = [
    CLEAN,
    AttackSpec("ddn", "l2", {"steps": 30}, factory=fb.attacks.DDNAttack),
    AttackSpec("l2-bisector", "l2", {"steps": 8}, factory=L2BisectorAttack, models=("prototype-abs",)),
    AttackSpec("pgd", "linf", {"steps": 10}, factory=fb.attacks.LinfPGD, epsilons=(0.05, 0.1, 0.2, 0.3, 0.4)),
]
result = run_evaluation(models, suite, foolbox_digits(), "your-model")
for row in result.robustness:
    print(f"{row['model']}, {row['norm']}: median {row['median distance']:.3g}")
print(result.report)
