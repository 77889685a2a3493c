"""Certify digits and meet the certificate with an attack; writes certify_an_image.png."""

import foolbox as fb
from matplotlib import pyplot as plt

from abs_defense import certify, load_model
from abs_defense.attacks import L2BisectorAttack
from abs_defense.data import foolbox_digits

digits = foolbox_digits().head(6)
model = load_model("prototype-abs")
certificate = certify(model, digits.images, digits.labels, norm="l2", method="exact")
wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
attacked, _, _ = L2BisectorAttack()(wrapped, digits.images, digits.labels, epsilons=None)
distances = fb.distances.l2(digits.images, attacked)

figure, axes = plt.subplots(3, len(digits), figsize=(1.4 * len(digits), 4.6), layout="constrained")
for j in range(len(digits)):
    panels = (
        (digits.images[j, 0], f"label {int(digits.labels[j])}"),
        (certificate.adversarial[j, 0], f"none below {certificate.radius[j]:.3f}\nnearest {int(certificate.rival[j])}"),
        (attacked[j, 0], f"attack: {distances[j]:.3f}"),
    )
    for axis, (image, title) in zip(axes[:, j], panels, strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8)
        axis.axis("off")
figure.savefig("certify_an_image.png", dpi=110)
for j in range(len(digits)):
    print(f"digit {int(digits.labels[j])}: certified {certificate.radius[j]:.4f} <= attack {distances[j]:.4f}")
