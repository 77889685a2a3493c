"""AutoAttack on ABS, unchanged; needs abs-defense[third-party]; writes attack_with_autoattack.png.

AutoAttack stops at the first success, within the bound; DDN then finds the smallest perturbation of the same images.
"""

import logging

import foolbox as fb
import torch
from matplotlib import pyplot as plt
from pyautoattack import AutoAttack

from abs_defense import ABS
from abs_defense.data import foolbox_digits

logging.basicConfig(level=logging.WARNING)  # AutoAttack's warnings
BOUND = 2.5
digits = foolbox_digits().head(6)
model = ABS(prototypes=1000, steps=0)
attack = AutoAttack(model, norm="L2", eps=BOUND, version="custom", attacks=["apgd-ce", "fab", "square"], seed=0)
attack.apgd.n_iter, attack.fab.n_iter, attack.square.n_queries = 20, 10, 100
attack.apgd.n_restarts = attack.fab.n_restarts = 1
adversarials, _ = attack.run_standard_evaluation(digits.images, digits.labels, batch_size=len(digits))

wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
smallest, _, _ = fb.attacks.DDNAttack(steps=30)(wrapped, digits.images, digits.labels, epsilons=None)

rows = {"original": digits.images, f"AutoAttack\nL2 ≤ {BOUND}": adversarials, "DDN": smallest}
figure, axes = plt.subplots(len(rows), len(digits), figsize=(1.3 * len(digits) + 1, 4.6), layout="constrained")
for (name, images), line in zip(rows.items(), axes, strict=True):
    predicted = model(images).argmax(1)
    wrong = predicted != digits.labels
    print(f"{' '.join(name.split())}: {int(wrong.sum())} of {len(digits)} misclassified")
    for j, axis in enumerate(line):
        distance = torch.linalg.vector_norm(images[j] - digits.images[j])
        title = f"{int(predicted[j])}" + (f" at {distance:.2f}" if distance else "")
        axis.imshow(images[j, 0], cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8, color="tab:red" if wrong[j] else "black")
        axis.set(xticks=[], yticks=[])
    line[0].set_ylabel(name, fontsize=8)
figure.savefig("attack_with_autoattack.png", dpi=110)
