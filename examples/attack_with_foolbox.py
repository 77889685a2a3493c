"""Attack ABS with a foolbox attack and true gradients; writes attack_with_foolbox.png."""

import foolbox as fb
import torch
from matplotlib import pyplot as plt

from abs_defense import load_model
from abs_defense.data import foolbox_digits

digits = foolbox_digits().head(8)
model = load_model("prototype-abs")
attack = fb.attacks.DDNAttack(steps=50)
wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
adversarials, _, success = attack(wrapped, digits.images, digits.labels, epsilons=None)
distances = fb.distances.l2(digits.images, adversarials)

inference = model.infer(adversarials)
figure, axes = plt.subplots(3, len(digits), figsize=(1.1 * len(digits), 3.8), layout="constrained")
for j in range(len(digits)):
    predicted = int(inference.prediction[j])
    panels = (
        (digits.images[j, 0], f"label {int(digits.labels[j])}"),
        (adversarials[j, 0], f"{predicted} at L2 {distances[j]:.2f}" if success[j] else "not fooled"),
        (inference.reconstructions[j, predicted, 0], f"explained as {predicted}"),
    )
    for axis, (image, title) in zip(axes[:, j], panels, strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8)
        axis.axis("off")
figure.savefig("attack_with_foolbox.png", dpi=110)
print(f"fooled {int(success.sum())} of {len(digits)}, median L2 {torch.median(distances[success]):.2f}")
