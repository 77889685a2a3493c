"""Weights of ABS models: our safetensors files, the bundled ones, and the authors' checkpoints."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from abs_defense._files import replace_atomically
from abs_defense.inference import DecoderStack
from abs_defense.models._vae import Decoder

FORMAT = "abs-defense/decoders/1"
_LAYERS = range(4)
_PROTOTYPES = "prototypes"
_PROTOTYPE_BETA = "prototype_beta"


@dataclass(frozen=True)
class Calibration:
    """Numbers found after training.

    Attributes:
        alpha: scale of the logits.
        eta: offset of the confidence softmax.
        gamma: Binary ABS's factor for each class.

    Raises:
        ValueError: alpha or a gamma is not a positive number, or eta less than 0.
    """

    alpha: float
    eta: float
    gamma: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (0 < self.alpha < math.inf and 0 <= self.eta < math.inf and all(0 < g < math.inf for g in self.gamma)):
            raise ValueError(
                "calibration: expected alpha and gamma above 0 and eta of at least 0, all finite, got "
                f"alpha={self.alpha}, eta={self.eta}, gamma={self.gamma}"
            )


PAPER_CALIBRATION = Calibration(
    alpha=440.0, eta=0.000039, gamma=(1.0, 0.96, 1.001, 1.06, 0.98, 0.96, 1.03, 1.0, 1.0, 1.0)
)


@dataclass(frozen=True)
class Weights:
    """All that inference needs.

    Attributes:
        decoders: of all classes.
        calibration: found after training.
        prototypes: latents chosen for the prototype classifier, ``(C, K, L)``; None if there are none.
        prototype_beta: weight of the KL term in the energies of that classifier.
    """

    decoders: DecoderStack
    calibration: Calibration
    prototypes: Tensor | None = None
    prototype_beta: float = 1.0


def bundled_weights() -> dict[str, Path]:
    """Names and files of the weights in this package."""
    folder = Path(str(importlib.resources.files("abs_defense.models") / "bundled"))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def sha256(path: str | Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_weights(source: str | Path | None) -> Weights:
    """Weights from a bundled name, a ``.safetensors`` file, the authors' folder of ``ABS_*.net``, or None (untrained).

    Nothing pickled is executed: the authors' files are read by torch's restricted loader. A bundled name wins over a
    file or folder of that name (users keep their data in folders called mnist): write ``"./mnist"`` for those.

    Raises:
        FileNotFoundError: neither a bundled name nor an existing path.
        ValueError: the file is truncated, is no such file, is a pickle with code in it, or holds another architecture
            or weights that are not finite.
    """
    if source is None:
        return _untrained()
    if isinstance(source, str) and source in bundled_weights():
        return _load_file(_bundled(source))
    path = Path(source)
    if path.is_dir():
        return load_authors_weights(path)
    if path.is_file():
        return _load_file(path)
    return _load_file(_bundled(str(source)))


def save_weights(path: str | Path, weights: Weights) -> None:
    """Write a ``.safetensors`` file that ``load_weights`` reads; it appears whole or not at all. Prototypes are rounded
    to half precision."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.decoders.state_dict().items()}
    if weights.prototypes is not None:
        tensors[_PROTOTYPES] = weights.prototypes.to(torch.float16).contiguous()
    metadata = {"format": FORMAT, "calibration": json.dumps(asdict(weights.calibration))}
    if weights.prototype_beta != 1.0:
        metadata[_PROTOTYPE_BETA] = repr(weights.prototype_beta)
    with replace_atomically(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)


def _untrained() -> Weights:
    """Randomly initialised decoders of 10 classes, the same each time, with the paper's calibration."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        decoders = [Decoder().eval() for _ in range(10)]
    return Weights(fold_decoders(decoders), PAPER_CALIBRATION)


def fold_decoders(decoders: Sequence[nn.Module]) -> DecoderStack:
    """Stack trained decoders (``Decoder`` modules), their batch norms folded into the convolutions."""
    return _fold([decoder.state_dict() for decoder in decoders])


@torch.no_grad()
def unfold_decoders(decoders: DecoderStack, samples: int = 2000) -> list[Decoder]:
    """Decoders that can be trained further, the inverse of ``fold_decoders``: each batch norm has the mean and variance
    of its layer on ``samples`` latents of the prior, and a scale and shift that undo it."""
    generator = torch.Generator().manual_seed(0)
    unfolded = []
    for c in range(decoders.num_classes):
        with torch.random.fork_rng(devices=[]):
            decoder = Decoder(decoders.latent_dim).eval()
        hidden = torch.randn(samples, decoders.latent_dim, 1, 1, generator=generator)
        for name, layer in decoder.named_children():
            if isinstance(layer, nn.ConvTranspose2d):
                index = name.removeprefix("conv_")
                layer.weight.copy_(decoders.get_parameter(f"weight_{index}")[c])
                layer.bias.copy_(decoders.get_parameter(f"bias_{index}")[c])  # type: ignore[union-attr]
            elif isinstance(layer, nn.BatchNorm2d):
                variance, mean = torch.var_mean(hidden, dim=(0, 2, 3))
                layer.load_state_dict(
                    {
                        "running_mean": mean,
                        "running_var": variance,
                        "weight": (variance + layer.eps).sqrt(),
                        "bias": mean,
                        "num_batches_tracked": layer.num_batches_tracked,
                    }
                )
            hidden = layer(hidden)
        unfolded.append(decoder)
    return unfolded


def load_authors_weights(folder: str | Path) -> Weights:
    """The authors' released checkpoints ``ABS_0.net`` .. ``ABS_{C-1}.net``, with the paper's calibration.

    Raises:
        FileNotFoundError: the folder has no such files, or one of them is missing.
        ValueError: a file is damaged, is a pickle with code in it, or holds another architecture.
    """
    folder = Path(folder)
    numbers = [int(m[1]) for p in folder.glob("ABS_*.net") if (m := re.fullmatch(r"ABS_(\d+)\.net", p.name))]
    if not numbers:
        raise FileNotFoundError(f"{folder} holds no ABS_*.net files of the authors")
    paths = [folder / f"ABS_{c}.net" for c in range(max(max(numbers) + 1, 10))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    stack = _fold([_authors_decoder(path) for path in paths])
    gamma = PAPER_CALIBRATION.gamma if len(paths) == 10 else (1.0,) * len(paths)
    return Weights(stack, Calibration(PAPER_CALIBRATION.alpha, PAPER_CALIBRATION.eta, gamma))


def _authors_decoder(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, because it is damaged or holds more than tensors (a pickle may run any code): "
            f"{str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: damaged or not a PyTorch checkpoint: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a state dict, got {type(state).__name__}")
    prefix = "Decoder."
    decoder = {str(k)[len(prefix) :]: v for k, v in state.items() if str(k).startswith(prefix)}
    with torch.device("meta"):  # no values, so nothing is drawn from the global random state
        expected = {key for key in Decoder().state_dict() if not key.endswith("num_batches_tracked")}
    if not expected <= decoder.keys():
        absent = ", ".join(sorted(prefix + key for key in expected - decoder.keys()))
        raise ValueError(f"{path}: these are the weights of another architecture; it lacks {absent}")
    try:
        _check_finite(decoder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return decoder


def _fold(states: Sequence[Mapping[str, Tensor]]) -> DecoderStack:
    epsilon = nn.BatchNorm2d(1).eps
    weights: list[list[Tensor]] = [[] for _ in _LAYERS]
    biases: list[list[Tensor]] = [[] for _ in _LAYERS]
    for state in states:
        for i in _LAYERS:
            weight, bias = state[f"conv_{i}.weight"], state[f"conv_{i}.bias"]
            if f"bn_{i}.weight" in state:
                mean, variance, scale, shift = (
                    state[f"bn_{i}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
                )
                weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, epsilon, scale, shift, transpose=True)
            weights[i].append(weight.detach())
            biases[i].append(bias.detach())
    try:
        return DecoderStack([torch.stack(w) for w in weights], [torch.stack(b) for b in biases])
    except RuntimeError as error:
        raise ValueError(f"the decoders of the classes differ in shape: {error}") from error


def _bundled(name: str) -> Path:
    bundled = bundled_weights()
    if name not in bundled:
        raise FileNotFoundError(
            f"no weights at {name!r}: expected a bundled name ({', '.join(bundled) or 'none in this installation'}), "
            "a .safetensors file, or a folder with the authors' ABS_*.net"
        )
    return bundled[name]


def _load_file(path: Path) -> Weights:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, truncated, or not a safetensors file: {error}") from error
    names = [f"{kind}_{i}" for i in _LAYERS for kind in ("weight", "bias")]
    if metadata.get("format") != FORMAT or not set(names) <= tensors.keys():
        raise ValueError(
            f"{path}: expected decoders of ABS (format {FORMAT!r}), got format {metadata.get('format')!r} "
            f"with tensors {', '.join(sorted(tensors)[:4]) or 'none'}"
        )
    try:
        stack = DecoderStack([tensors[f"weight_{i}"] for i in _LAYERS], [tensors[f"bias_{i}"] for i in _LAYERS])
        calibration = _parse_calibration(metadata.get("calibration", ""), stack.num_classes)
        prototypes = _parse_prototypes(tensors.get(_PROTOTYPES), stack)
        prototype_beta = _parse_beta(metadata.get(_PROTOTYPE_BETA, "1.0"))
        _check_finite(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Weights(stack, calibration, prototypes, prototype_beta)


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ValueError(f"expected finite weights, got NaN or infinity in {', '.join(sorted(broken))}")


def _parse_prototypes(latents: Tensor | None, stack: DecoderStack) -> Tensor | None:
    if latents is None:
        return None
    shape = tuple(latents.shape)
    if len(shape) != 3 or (shape[0], shape[2]) != (stack.num_classes, stack.latent_dim) or not shape[1]:
        raise ValueError(f"expected prototypes of shape ({stack.num_classes}, K, {stack.latent_dim}), got {shape}")
    return latents.float()


def _parse_beta(text: str) -> float:
    try:
        beta = float(text)
    except ValueError:
        beta = math.nan
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"expected a prototype_beta of at least 0, got {text!r}")
    return beta


def _parse_calibration(text: str, num_classes: int) -> Calibration:
    try:
        raw = json.loads(text)
        calibration = Calibration(float(raw["alpha"]), float(raw["eta"]), tuple(float(g) for g in raw["gamma"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"damaged calibration {text!r}: {error}") from error
    if len(calibration.gamma) != num_classes:
        raise ValueError(f"calibration has {len(calibration.gamma)} gammas for {num_classes} classes")
    return calibration
