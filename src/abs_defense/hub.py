"""Models in folders and repositories of the Hugging Face Hub.

A folder holds ``config.json`` (the class and the constructor's settings), ``model.safetensors`` (decoders and
calibration, a file that ``ABS(weights=...)`` reads too), ``prototypes.safetensors`` (only if the prototypes are not
drawn from the seed) and ``README.md`` (the model card). Nothing is pickled. ``ABS.save_pretrained``,
``ABS.from_pretrained`` and ``ABS.push_to_hub`` call this module; it needs the extra ``hub``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from abs_defense._files import replace_atomically
from abs_defense.inference import DecoderStack, sample_latents
from abs_defense.models import ABS, BinaryABS, Calibration, Weights, load_card, load_weights, save_weights, state_sha256

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
except ImportError as error:  # pragma: no cover
    raise ImportError("the Hugging Face Hub needs huggingface_hub: pip install 'abs-defense[hub]'") from error

FORMAT = "abs-defense/model/1"
CONFIG, WEIGHTS, PROTOTYPES, CARD = "config.json", "model.safetensors", "prototypes.safetensors", "README.md"
_LATENTS = "latents"
_KINDS: dict[str, type[ABS]] = {"ABS": ABS, "BinaryABS": BinaryABS}
_SETTINGS = tuple(name for name in inspect.signature(ABS).parameters if name not in ("weights", "prototypes"))

Model = TypeVar("Model", bound=ABS)


def save_pretrained(model: ABS, folder: str | Path, **kwargs: Any) -> str | None:
    """Write a model to a folder, in float32; ``from_pretrained`` makes an equal one of it.

    Args:
        model: ABS or Binary ABS.
        folder: made if missing. A ``README.md`` that is there is kept, unless an earlier call wrote it and nobody has
            edited it since.
        kwargs: of ``huggingface_hub.ModelHubMixin.save_pretrained``, such as ``push_to_hub=True``.

    Returns:
        The address of the commit if pushed, else None.

    Raises:
        TypeError: the model is of another class.
        OSError: the folder cannot be written.
    """
    wrapped, card = _HubModel(model), Path(folder) / CARD
    if card.is_file() and _is_as_written(card.read_text(encoding="utf-8")):
        card.unlink()
    result: str | None = wrapped.save_pretrained(folder, **kwargs)
    return result


def push_to_hub(model: ABS, repo_id: str, **kwargs: Any) -> str:
    """Upload a model to a repository of the Hub; return the commit's address.

    Args:
        model: ABS or Binary ABS.
        repo_id: ``"user/name"``.
        kwargs: of ``huggingface_hub.ModelHubMixin.push_to_hub``: ``token``, ``private``, ``branch``, ...

    Raises:
        TypeError: the model is of another class.
    """
    return str(_HubModel(model).push_to_hub(repo_id, **kwargs))


def from_pretrained(kind: type[Model], source: str | Path, **kwargs: Any) -> Model:
    """A model from a folder that ``save_pretrained`` wrote, or from a repository of the Hub.

    Args:
        kind: ``ABS`` or ``BinaryABS``.
        source: a folder, or ``"user/name"`` of a repository.
        kwargs: of ``huggingface_hub.ModelHubMixin.from_pretrained`` (``revision``, ``token``, ``cache_dir``,
            ``force_download``, ``local_files_only``), and settings of the constructor that replace the stored ones.

    Raises:
        FileNotFoundError: no such folder, or it lacks a file.
        ValueError: the folder holds another kind of model, or a file of it is damaged.
        TypeError: an unknown setting.
    """
    path = Path(source).expanduser()
    if not path.is_dir() and (isinstance(source, Path) or str(source).startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{source}: no such folder; a repository of the Hub is written 'user/name'")
    try:
        loaded = _HubModel.from_pretrained(str(path) if path.is_dir() else str(source), **kwargs).model
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: damaged {CONFIG}: {error}") from error
    if type(loaded) is not kind:
        stored = type(loaded).__name__
        raise ValueError(f"{source}: expected {kind.__name__}, got {stored}: load it with {stored}.from_pretrained")
    return loaded


class _HubModel(ModelHubMixin, library_name="abs-defense", license="apache-2.0"):
    """The hub's mixin around one of our models, so that the models need no huggingface_hub."""

    # The mixin fills parameters that the config has, so this one's name must not be in there.
    def __init__(self, wrapped: ABS) -> None:
        if _KINDS.get(type(wrapped).__name__) is not type(wrapped):
            raise TypeError(f"model: expected ABS or BinaryABS, got {type(wrapped).__name__}")
        self.model = wrapped

    def _save_pretrained(self, save_directory: Path) -> None:
        model, extra = self.model, save_directory / PROTOTYPES
        sampled = _is_sampled(model)
        if sampled:
            extra.unlink(missing_ok=True)
        else:
            latents = model.prototype_latents.detach().to("cpu", torch.float32).contiguous()
            with replace_atomically(extra) as path:
                safetensors.torch.save_file({_LATENTS: latents}, path)
        save_weights(save_directory / WEIGHTS, _weights(model))
        config = {
            "format": FORMAT,
            "model": type(model).__name__,
            "prototypes": model.prototype_latents.shape[-2] if sampled else PROTOTYPES,
            **_settings(model),
        }
        with replace_atomically(save_directory / CONFIG) as path:
            path.write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict[str, Any] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **settings: Any,
    ) -> _HubModel:
        settings = {name: value for name, value in settings.items() if name not in ("proxies", "resume_download")}

        def find(name: str) -> Path:
            if Path(model_id).is_dir():
                if not (Path(model_id) / name).is_file():
                    raise FileNotFoundError(f"{model_id}: expected a folder with {CONFIG} and {WEIGHTS}; no {name}")
                return Path(model_id) / name
            downloaded = hf_hub_download(
                model_id,
                name,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
            return Path(str(downloaded))

        if config is None:
            find(CONFIG)  # which says why there is none
            raise ValueError(f"{model_id}: {CONFIG} could not be read")
        kind, stored = _parse_config(model_id, config)
        weights = load_weights(find(WEIGHTS))
        if stored["prototypes"] == PROTOTYPES and "prototypes" not in settings:
            stored["prototypes"] = _load_prototypes(find(PROTOTYPES))
        try:
            return cls(kind(weights, **{**stored, **settings}))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{model_id}: {error}") from error

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card with what is known of the model: its settings, and test figures if its weights are bundled."""
        model = self.model
        name = "Binary ABS" if isinstance(model, BinaryABS) else "ABS"
        accuracy = _known_accuracy(model)
        data = ModelCardData(
            license="apache-2.0",
            library_name="abs-defense",
            pipeline_tag="image-classification",
            tags=["adversarial-robustness", "analysis-by-synthesis", "mnist", "foolbox", "arxiv:1805.09190"],
            datasets=["ylecun/mnist"] if accuracy is not None else None,
            metrics=["accuracy"] if accuracy is not None else None,
            model_name=name,
            eval_results=None if accuracy is None else [_result(accuracy)],
        )
        settings = {"prototypes": model.prototype_latents.shape[-2], **_settings(model)}
        figures = (
            "No test figures are known of these weights and settings."
            if accuracy is None
            else f"{accuracy:.2%} of all 10,000 MNIST test images (clean)."
        )
        text = _CARD.format(
            data=data.to_yaml(),
            name=name,
            kind=type(model).__name__,
            classes=model.num_classes,
            sha256=model.weights_sha256(),
            settings="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
            figures=figures,
        )
        body = str(ModelCard(text))
        return ModelCard(f"{body}\n<!-- abs-defense {_digest(body)} (replaced by the next save unless edited) -->\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


def _is_as_written(card: str) -> bool:
    """Whether a card is one of ours that nobody has edited."""
    body, mark, rest = card.rpartition("\n<!-- abs-defense ")
    return bool(mark) and rest.split(" ")[0] == _digest(body)


_CARD = """---
{data}
---

# {name}

Analysis by Synthesis (Schott, Rauber, Bethge, Brendel, ICLR 2019, arXiv:1805.09190): one VAE decoder for each of
{classes} classes; the class whose decoder explains the image best wins. 28x28 grey images in [0, 1] in, logits out.

```python
from abs_defense import {kind}

model = {kind}.from_pretrained("this folder or repository")
logits = model(images)  # (N, 1, 28, 28) floats in [0, 1] -> (N, {classes})
```

Install with `pip install abs-defense[hub]`.

| setting | |
|---|---|
{settings}

Weights and calibration: sha256 `{sha256}`.

## Figures

{figures}

## Limits

Attacks give upper bounds on the robustness; a stronger one may find smaller perturbations. Certified radii are proved
only without latent descent (`steps=0`). Nothing here scales to natural images as it stands.
"""


def _result(accuracy: float) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type="ylecun/mnist",
        dataset_name="MNIST",
        dataset_split="test",
        metric_type="accuracy",
        metric_value=accuracy,
    )


def _settings(model: ABS) -> dict[str, Any]:
    """The constructor's settings but for weights and prototypes."""
    return {name: getattr(model.settings if hasattr(model.settings, name) else model, name) for name in _SETTINGS}


def _is_sampled(model: ABS) -> bool:
    """Whether the prototypes are those that the seed draws."""
    latents = model.prototype_latents
    if latents.ndim != 2:
        return False
    return torch.equal(latents.cpu(), sample_latents(len(latents), model.latent_dim, model.seed).to(latents.dtype))


def _weights(model: ABS) -> Weights:
    state = {name: value.detach().to("cpu", torch.float32) for name, value in model.decoders.state_dict().items()}
    layers = range(len(state) // 2)
    stack = DecoderStack([state[f"weight_{i}"] for i in layers], [state[f"bias_{i}"] for i in layers])
    gamma = model.gamma.tolist() if isinstance(model, BinaryABS) else [1.0] * model.num_classes
    return Weights(stack, Calibration(float(model.alpha), float(model.eta), tuple(gamma)))


def _parse_config(source: str, config: dict[str, Any]) -> tuple[type[ABS], dict[str, Any]]:
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{source}: {CONFIG} is not of an ABS model: expected format {FORMAT!r}, got {found!r}")
    kind = _KINDS.get(str(config.get("model")))
    if kind is None:
        raise ValueError(f"{source}: expected the model ABS or BinaryABS, got {config.get('model')!r}")
    settings = {name: value for name, value in config.items() if name not in ("format", "model")}
    if unknown := sorted(settings.keys() - {*_SETTINGS, "prototypes"}):
        raise ValueError(f"{source}: {CONFIG} has unknown settings {', '.join(unknown)}; a newer version wrote it?")
    if settings.get("solver") == "bfgs":
        del settings["solver"]  # the default, which another gradient may change
    if "prototypes" not in settings:
        raise ValueError(f"{source}: {CONFIG} lacks prototypes")
    return kind, settings


def _load_prototypes(path: Path) -> Tensor:
    try:
        return safetensors.torch.load_file(path)[_LATENTS]
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path}: damaged, truncated, or no file of prototypes: {error}") from error


def _known_accuracy(model: ABS) -> float | None:
    """Accuracy on all MNIST test images, from the card of the bundled weights; None for any other weights or settings.

    The card's figures are those of the default settings, and of ``steps=0`` on the prototypes of the weights.
    """
    kind = type(model)
    bundled = load_weights("mnist")
    usual = kind(bundled, prototypes=1)
    if model.weights_sha256() != state_sha256(usual):
        return None
    settings, usual_settings = _settings(model), _settings(usual)
    differing = {name for name in _SETTINGS if settings[name] != usual_settings[name]} - {"gradient"}
    latents = sample_latents(inspect.signature(kind).parameters["prototypes"].default, model.latent_dim, 0)
    if not differing:
        figure = {ABS: "abs", BinaryABS: "binary-abs"}[kind]
    elif kind is ABS and differing <= {"steps", "solver", "beta"} and bundled.prototypes is not None:
        if model.settings.steps or model.settings.beta != bundled.prototype_beta:
            return None
        figure, latents = "prototype-abs", bundled.prototypes
    else:
        return None
    known = torch.equal(model.prototype_latents.cpu().float(), latents)
    return float(load_card("mnist")["test_figures"][figure]["accuracy"]) if known else None
