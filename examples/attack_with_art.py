"""ABS under ART's attacks, and our attacks in ART; writes attack_with_art.png."""

import numpy as np
from art.attacks.evasion import AutoProjectedGradientDescent, FastGradientMethod
from matplotlib import pyplot as plt

from abs_defense import ABS
from abs_defense.art import ABSClassifier, LatentDescent, Pointwise
from abs_defense.data import foolbox_digits

digits = foolbox_digits().head(5)
images, labels = digits.images.numpy(), digits.labels.numpy()
classifier = ABSClassifier(ABS(prototypes=2000, steps=0))  # or a name: "abs", "binary-abs", "prototype-abs", ...
attacks = {
    "FGM, L∞ 0.25": FastGradientMethod(classifier, eps=0.25),
    "AutoPGD, L∞ 0.25": AutoProjectedGradientDescent(
        classifier, eps=0.25, max_iter=20, nb_random_init=1, verbose=False
    ),
    "Latent Descent": LatentDescent(classifier, stepsize=0.05, verbose=False),
    "Pointwise": Pointwise(classifier, max_queries=400, verbose=False),
}

figure, axes = plt.subplots(len(attacks) + 1, len(images), figsize=(1.3 * len(images) + 1, 7), layout="constrained")
rows = {"original": images} | {name: attack.generate(images, labels) for name, attack in attacks.items()}
for i, (name, perturbed) in enumerate(rows.items()):
    predicted = classifier.predict(perturbed).argmax(1)
    print(f"{name}: {np.mean(predicted != labels):.0%} misclassified")
    for j, axis in enumerate(axes[i]):
        axis.imshow(perturbed[j, 0], cmap="gray", vmin=0, vmax=1)
        axis.set_title(str(predicted[j]), fontsize=8, color="tab:red" if predicted[j] != labels[j] else "black")
        axis.set(xticks=[], yticks=[])
    axes[i, 0].set_ylabel(name, fontsize=8)
figure.savefig("attack_with_art.png", dpi=110)
