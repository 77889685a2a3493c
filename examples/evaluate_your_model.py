"""Your own model beside ABS under a small suite; writes the report your-model/report.html with its pictures."""

import foolbox as fb
import torch
from torch import nn

from abs_defense import ABS
from abs_defense.attacks import L2BisectorAttack, LInfBisectorAttack
from abs_defense.benchmark import CLEAN, AttackSpec, ModelSpec, our_model, run_evaluation
from abs_defense.data import foolbox_digits


def your_model() -> nn.Module:
    """Any module of images in [0, 1] that returns logits: here, a small network that has learned from ABS's samples."""
    images = ABS(prototypes=300).prototype_images
    labels = torch.arange(10).repeat_interleave(images.shape[1])
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images.flatten(0, 1)), labels).backward()
        optimizer.step()
    return network


models = [ModelSpec("yours", your_model), our_model("prototype-abs")]
others, ours = ("other",), ("prototype-abs",)  # each kind of model gets attacks that suit it
suite = [
    CLEAN,
    AttackSpec("ddn", "l2", {"steps": 30}, others, factory=fb.attacks.DDNAttack),
    AttackSpec("pgd", "linf", {"steps": 10}, others, factory=fb.attacks.LinfPGD, epsilons=(0.05, 0.1, 0.2, 0.4)),
    AttackSpec("l2-bisector", "l2", {"steps": 8, "rivals": 1}, ours, factory=L2BisectorAttack),
    AttackSpec("linf-bisector", "linf", {"steps": 8, "rivals": 1}, ours, factory=LInfBisectorAttack),
]
result = run_evaluation(models, suite, foolbox_digits().head(6), "your-model")
for row in result.robustness:
    print(f"{row['model']}, {row['norm']}: median {row['median distance']:.3g}")
print(result.report)
