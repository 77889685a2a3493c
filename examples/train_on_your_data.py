"""Train ABS on other digits than MNIST's, a tiny training on few images; writes train_on_your_data.png."""

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch.nn import functional as F

from abs_defense import ABS
from abs_defense.data import ImageSet
from abs_defense.training import VAETraining, train_abs

# Your data: (N, 1, 28, 28) in [0, 1], and labels from 0. Here 8x8 digits 0 to 3, enlarged to 20x20 with a black edge.
raw = load_digits(n_class=4)
enlarged = F.interpolate(torch.from_numpy(raw.images).float()[:, None] / 16, size=(20, 20), mode="bilinear")
images, labels = F.pad(enlarged, (4, 4, 4, 4)), torch.from_numpy(raw.target).long()
train, test = ImageSet(images[:400], labels[:400], "8x8 digits"), ImageSet(images[400:460], labels[400:460], "unseen")

recipe = VAETraining(epochs=20, kl_epochs=10, decay_from=10, batch_size=25, augment=0.0)
train_abs(train, "your-training", recipe, calibration_images=40, prototypes=0)
model = ABS("your-training/abs.safetensors", prototypes=500)

inference = model.infer(test.images)
right = inference.prediction == test.labels
print(f"{right.double().mean():.0%} of {len(test)} unseen images are classified correctly")

classes = model.num_classes
figure, axes = plt.subplots(classes, 2 * classes + 1, figsize=(9, 4.2), layout="constrained")
for label, row in enumerate(axes):
    i = int((test.labels == label).nonzero()[0])
    panels = [(test.images[i, 0], f"label {label}", "black")]
    for c in range(classes):
        color = "tab:green" if c == inference.prediction[i] else "black"
        panels.append((inference.reconstructions[i, c, 0], f"{c}: {inference.energy[i, c]:.1f}", color))
    samples = model.prototype_images[label, :classes].view(-1, 28, 28)
    panels += [(sample, f"sample of {label}", "tab:blue") for sample in samples]
    for axis, (image, title, color) in zip(row, panels, strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8, color=color)
        axis.axis("off")
figure.savefig("train_on_your_data.png", dpi=110)
