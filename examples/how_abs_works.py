"""The pictures of the page "How ABS works"; writes five how_abs_works_*.png."""

import foolbox as fb
import torch
from matplotlib import pyplot as plt

from abs_defense import ABS, load_model
from abs_defense.attacks import L2BisectorAttack
from abs_defense.data import foolbox_digits

digits = foolbox_digits()
model = ABS(prototypes=2000)  # a quarter of the paper's, to be quick
seven, label = digits.images[:1], int(digits.labels[0])


def show(axis, image, title="", color="black"):
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=9, color=color)
    axis.set(xticks=[], yticks=[])


def save(figure, name):
    figure.savefig(f"how_abs_works_{name}.png", dpi=110)
    print(f"how_abs_works_{name}.png")


# Synthesis: samples of each class's model.
figure, axes = plt.subplots(3, 10, figsize=(7, 2.4), layout="constrained")
for c, column in enumerate(axes.T):
    for axis, image in zip(column, model.prototype_images[c], strict=False):
        show(axis, image.view(28, 28))
    column[0].set_title(f"class {c}", fontsize=9)
save(figure, "synthesis")

# Analysis: what each class makes of one image.
inference = model.infer(seven)
prediction, rival = inference.energy[0].argsort()[:2].tolist()
figure, axes = plt.subplot_mosaic(
    [["x", "x", *range(5)], ["x", "x", *range(5, 10)]], figsize=(7, 2.6), layout="constrained"
)
show(axes["x"], seven[0, 0], "the image x")
for c in range(10):
    color = "tab:green" if c == prediction else "black"
    show(axes[c], inference.reconstructions[0, c, 0], f"{c}: {inference.energy[0, c]:.1f}", color)
save(figure, "analysis")

# Descent: from the best of few prototypes to the best latent.
steps = (0, 2, 5, 10, 20, 50)
course = [ABS(prototypes=100, steps=k, solver="adam").infer(seven) for k in steps]
shown = ((prediction, "tab:green"), (rival, "tab:red"))
figure = plt.figure(figsize=(7, 5.2), layout="constrained")
curves, pictures = figure.subfigures(2, height_ratios=(3, 2.4))
axis = curves.subplots()
axis.plot(steps, torch.cat([each.energy for each in course]).numpy(), color="0.75", linewidth=1)
for c, color in shown:
    axis.plot(steps, [each.energy[0, c] for each in course], color=color, marker="o", label=f"class {c}")
axis.set(xlabel="steps of latent descent", ylabel="energy (nats)")
axis.legend()
for (c, color), row in zip(shown, pictures.subplots(2, len(steps)), strict=True):
    for axis, each, k in zip(row, course, steps, strict=True):
        show(axis, each.reconstructions[0, c, 0], f"step {k}: {each.energy[0, c]:.1f}", color)
save(figure, "descent")

# Attack: the way to the nearest image that another class explains better.
wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
adversarial, _, _ = L2BisectorAttack(steps=8, rivals=1)(wrapped, seven, digits.labels[:1], epsilons=None)
way = torch.linspace(0, 1, 7)
images = torch.lerp(seven, adversarial, way.view(-1, 1, 1, 1))
inference = model.infer(images)
winner = int(inference.prediction[-1])
figure = plt.figure(figsize=(7, 5.8), layout="constrained")
curves, pictures = figure.subfigures(2, height_ratios=(3, 3.4))
axis = curves.subplots()
axis.plot(way, inference.energy.numpy(), color="0.75", linewidth=1)
for c, color in ((label, "tab:green"), (winner, "tab:red")):
    axis.plot(way, inference.energy[:, c], color=color, marker="o", label=f"class {c}")
axis.set(xlabel="way from the image to its adversarial", ylabel="energy (nats)")
axis.legend()
rows = pictures.subplots(3, len(way))
for j in range(len(way)):
    show(rows[0, j], images[j, 0], f"L2 {(images[j] - seven[0]).norm():.2f}")
    show(rows[1, j], inference.reconstructions[j, label, 0])
    show(rows[2, j], inference.reconstructions[j, winner, 0])
for row, name in zip(rows[:, 0], ("image", f"class {label}", f"class {winner}"), strict=True):
    row.set_ylabel(name, fontsize=9)
save(figure, "attack")

# Confidence: who is sure of what?
columns, rows = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="xy")
strange = {
    "a digit": seven[0, 0],
    "inverted": 1 - seven[0, 0],
    "stripes": (columns // 4 % 2).float(),
    "rings": ((columns - 13.5).hypot(rows - 13.5) // 3 % 2).float(),
    "noise": torch.rand(28, 28, generator=torch.Generator().manual_seed(0)),
    "grey": torch.full((28, 28), 0.5),
}
batch = torch.stack(list(strange.values()))[:, None]
probabilities = {"ABS": model.predict_proba(batch), "CNN": load_model("cnn").predict_proba(batch)}
figure, (pictures, bars) = plt.subplots(
    2, len(strange), figsize=(7, 2.8), layout="constrained", sharey="row", height_ratios=(1, 1.3)
)
for j, (name, image) in enumerate(strange.items()):
    show(pictures[j], image, name)
    heights = [float(p[j].max()) for p in probabilities.values()]
    drawn = bars[j].bar(list(probabilities), heights, 0.7, color=["tab:green", "tab:orange"])
    bars[j].bar_label(drawn, [f"{height:.2f}" for height in heights], fontsize=8)
    bars[j].axhline(0.1, color="0.6", linestyle=":", linewidth=1)
bars[0].set(ylabel="confidence", ylim=(0, 1.15))
save(figure, "confidence")
