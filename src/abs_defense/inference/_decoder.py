"""The decoders of all classes, and the form in which one of them is fast.

``DecoderStack`` holds the weights as they are stored: four transposed convolutions a class with batch norm folded
in. ``ClassDecoder`` holds one class's weights rearranged so that no transposed convolution with few channels is left,
and knows the decoder's derivative, so that latent descent needs no autograd graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SHAPE = (1, 28, 28)
PIXELS = 784
KERNELS = (4, 5, 5, 4)
STRIDES = (1, 2, 2, 1)
_LOG2_E = math.log2(math.e)
# Measured on a CPU, in units of what one more latent costs.
_COST_OF_CALL = 5.0
_COST_OF_JOINT_CALL = 7.0
_COST_OF_JOINT_DECODING = 1.5


class DecoderStack(nn.Module):
    """The decoders G_1 .. G_C as frozen parameters, batch norm folded into the convolutions.

    Layer i holds ``weight_i`` of shape ``(C, in, out, k, k)`` and ``bias_i`` of shape ``(C, out)``: a transposed
    convolution with kernel k = (4, 5, 5, 4)[i] and stride (1, 2, 2, 1)[i], followed by ELU, or by a sigmoid at the
    end. ``weight_0`` has the L latents as input channels.

    Raises:
        ValueError: the tensors are not such a stack.
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor]) -> None:
        super().__init__()
        _check_architecture(weights, biases)
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            self.register_parameter(f"weight_{i}", nn.Parameter(weight.clone(), requires_grad=False))
            self.register_parameter(f"bias_{i}", nn.Parameter(bias.clone(), requires_grad=False))

    @property
    def num_classes(self) -> int:
        return self._layer(0)[0].shape[0]

    @property
    def latent_dim(self) -> int:
        return self._layer(0)[0].shape[1]

    def _layer(self, index: int) -> tuple[Tensor, Tensor]:
        # Plain attributes, because the replicas of DataParallel have no parameters.
        return getattr(self, f"weight_{index}"), getattr(self, f"bias_{index}")

    def class_decoders(self) -> list[ClassDecoder]:
        """One ``ClassDecoder`` a class, in the parameters' precision but at least float32.

        Costs well below one decoding, so it is done anew for each call: nothing can go stale when weights are
        loaded or moved.
        """
        layers = [self._layer(i) for i in range(len(KERNELS))]
        dtype = torch.promote_types(layers[0][0].dtype, torch.float32)
        return [
            ClassDecoder(
                [weight[c].detach().to(dtype).clone() for weight, _ in layers],
                [bias[c].detach().to(dtype).clone() for _, bias in layers],
            )
            for c in range(self.num_classes)
        ]

    def forward(self, latents: Tensor) -> Tensor:
        """Decode ``(C, N, L)`` latents into ``(C, N, 1, 28, 28)`` images, as plainly as PyTorch allows."""
        images = []
        for c in range(self.num_classes):
            hidden = latents[c][:, :, None, None]
            for i, stride in enumerate(STRIDES):
                weight, bias = self._layer(i)
                hidden = F.conv_transpose2d(hidden, weight[c], bias[c], stride)
                hidden = torch.sigmoid(hidden) if i == len(STRIDES) - 1 else F.elu(hidden)
            images.append(hidden)
        return torch.stack(images)


def _check_architecture(weights: list[Tensor], biases: list[Tensor]) -> None:
    layers = len(KERNELS)
    if len(weights) != layers or len(biases) != layers:
        raise ValueError(f"expected {layers} weights and biases, got {len(weights)} and {len(biases)}")
    classes = weights[0].shape[0]
    inputs = weights[0].shape[1] if weights[0].ndim == 5 else None
    for i, (weight, bias, kernel) in enumerate(zip(weights, biases, KERNELS, strict=True)):
        outputs = 1 if i == layers - 1 else (weight.shape[2] if weight.ndim == 5 else None)
        expected = (classes, inputs, outputs, kernel, kernel)
        if tuple(weight.shape) != expected or tuple(bias.shape) != (classes, outputs):
            raise ValueError(
                f"decoder layer {i}: expected a weight of shape {_readable(expected)} and a bias of shape "
                f"{_readable((classes, outputs))}, got {tuple(weight.shape)} and {tuple(bias.shape)}; "
                "these are the weights of another architecture"
            )
        if not weight.is_floating_point():
            raise ValueError(f"decoder layer {i}: expected floating point weights, got {weight.dtype}")
        inputs = outputs


def _readable(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"


class _Decoders:
    """The rearranged weights of G classes, and what is computed with them: ``(G, N, L)`` latents to ``(G, N, 784)``
    images in (0, 1), with their derivative.

    The first layer acts on one pixel and is a matrix product. A transposed convolution of stride 2 writes each of the
    four pixel parities ("phases") with taps of its own, so it is a 3x3 convolution of stride 1 to four times the
    channels, in G groups. The last layer works on phases too: a matrix product to 9 taps x 4 phases, and nine shifted
    sums. Between them the channels come last, class after class.

    All operations are differentiable, so the same code is unrolled when somebody wants gradients through the descent.
    """

    w0: Tensor
    b0: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w1_adjoint: Tensor
    w2_adjoint: Tensor
    w3: Tensor
    w3_adjoint: Tensor
    b3: Tensor

    def _forward(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        g, n = latents.shape[:2]
        h0 = _elu(torch.baddbmm(self.b0, latents, self.w0)).view(g, n, 16, -1).permute(1, 2, 0, 3).reshape(n, 4, 4, -1)
        h1 = _elu(_convolve(h0, self.w1, g, self.b1, padding=2))
        image = _phases_to_pixels(h1, g)[:, :11, :11]
        h2 = _elu(_convolve(image, self.w2, g, self.b2, padding=2))
        _clear_pixel_25(h2, g)
        taps = (h2.view(n * 169, g, -1).transpose(0, 1) @ self.w3).view(g, n, 13, 13, 3, 3, 2, 2)
        sums = taps.new_zeros(g, n, 15, 15, 2, 2)
        for i in range(3):
            for j in range(3):
                sums[:, :, i : i + 13, j : j + 13] += taps[:, :, :, :, i, j]
        pixels = sums[:, :, :14, :14].permute(0, 1, 2, 4, 3, 5).reshape(g, n, PIXELS)
        return torch.sigmoid(pixels + self.b3), (h0, h1, h2)

    def _pullback(self, latents: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        decoded, (h0, h1, h2) = self._forward(latents)
        g, n = decoded.shape[:2]
        grad = _sigmoid_backward(gradient(decoded), decoded)
        grad = grad.view(g, n, 14, 2, 14, 2).permute(1, 2, 4, 0, 3, 5).reshape(n, 14, 14, 4 * g)
        grad = _elu_backward(_convolve(F.pad(grad, (0, 0, 0, 1, 0, 1)), self.w3_adjoint, g), h2)
        _clear_pixel_25(grad, g)
        grad = _convolve(grad, self.w2_adjoint, g)
        grad = _elu_backward(_pixels_to_phases(F.pad(grad, (0, 0, 0, 1, 0, 1)), g), h1)
        grad = _elu_backward(_convolve(grad, self.w1_adjoint, g), h0)
        return grad.view(n, 16, g, -1).permute(2, 0, 1, 3).reshape(g, n, -1) @ self.w0.transpose(1, 2)

    def _squared_error_and_gradient(self, latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        errors = []

        def gradient(decoded: Tensor) -> Tensor:
            difference = decoded - images
            errors.append(difference.square().sum(-1))
            return 2.0 * difference

        slope = self._pullback(latents, gradient)
        return errors[0], slope


class ClassDecoder(_Decoders):
    """One class's decoder: ``(N, L)`` latents to ``(N, 784)`` images in (0, 1), with its derivative."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor]) -> None:
        w0, w1, w2, w3 = weights
        b0, b1, b2, b3 = biases
        self.w0 = w0.permute(0, 2, 3, 1).reshape(1, w0.shape[0], -1).contiguous()
        self.b0 = b0.repeat(KERNELS[0] ** 2)[None, None]
        self.w1, self.b1 = _channels_last(_phase_weight(w1)), b1.repeat(4)
        self.w2, self.b2 = _channels_last(_phase_weight(w2)), b2.repeat(4)
        self.w1_adjoint = _channels_last(self.w1.flip(2, 3).transpose(0, 1))
        self.w2_adjoint = _channels_last(self.w2.flip(2, 3).transpose(0, 1))
        taps = _last_layer_taps(w3)
        self.w3 = taps.reshape(1, taps.shape[0], -1)
        self.w3_adjoint = _channels_last(taps.permute(0, 3, 1, 2))
        self.b3 = b3[None, None]

    def __call__(self, latents: Tensor) -> Tensor:
        return self._forward(latents[None])[0][0]

    def squared_error_gradient(self, latents: Tensor, images: Tensor) -> Tensor:
        """d/dz ||G(z) - x||^2: ``(N, L), (N, 784) -> (N, L)``."""
        return self.pullback(latents, lambda decoded: 2.0 * (decoded - images))

    def squared_error_and_gradient(self, latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """||G(z) - x||^2 and its derivative: ``(N, L), (N, 784) -> (N,), (N, L)``."""
        errors, slopes = self._squared_error_and_gradient(latents[None], images)
        return errors[0], slopes[0]

    def pullback(self, latents: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """d/dz f(G(z)) for the ``gradient`` df/dG, a function of the decoded images: ``(N, L) -> (N, L)``."""
        return self._pullback(latents[None], lambda decoded: gradient(decoded[0])[None])[0]


class JointDecoder(_Decoders):
    """The decoders of G classes in one pass: ``(G, N, L)`` latents to ``(G, N, 784)`` images, with the derivative.

    For a few images up to three times as fast as class by class, because there the calls are what costs; for many
    slower, because the activations of all classes do not fit in a CPU's cache.
    """

    def __init__(self, decoders: Sequence[ClassDecoder]) -> None:
        for name in _Decoders.__annotations__:
            setattr(self, name, torch.cat([getattr(decoder, name) for decoder in decoders]))

    @classmethod
    def of(cls, decoders: Sequence[ClassDecoder]) -> JointDecoder | None:
        """None where there is nothing to join, or decoders of another kind."""
        joinable = len(decoders) > 1 and all(isinstance(decoder, ClassDecoder) for decoder in decoders)
        return cls(decoders) if joinable else None

    @staticmethod
    def is_faster(counts: Sequence[int]) -> bool:
        """Whether one pass is faster than one a class, for so many latents of each class: the largest count is what
        each takes part with."""
        one_pass = _COST_OF_JOINT_CALL + _COST_OF_JOINT_DECODING * len(counts) * max(counts)
        return one_pass < sum(_COST_OF_CALL + count for count in counts if count)

    def __call__(self, latents: Tensor) -> Tensor:
        return self._forward(latents)[0]

    def squared_error_and_gradient(self, latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """||G(z) - x||^2 and its derivative: ``(G, N, L), (N, 784) or (G, N, 784) -> (G, N), (G, N, L)``."""
        return self._squared_error_and_gradient(latents, images)


def _convolve(image: Tensor, weight: Tensor, groups: int, bias: Tensor | None = None, *, padding: int = 0) -> Tensor:
    """A convolution of images whose channels come last, ``(N, height, width, channels)``."""
    return F.conv2d(image.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=groups).permute(0, 2, 3, 1)


def _elu(a: Tensor) -> Tensor:
    """elu(a) = max(a, exp(min(a, 0)) - 1); in place unless autograd watches.

    On a CPU torch's ELU takes longer than the convolution before it; the same from ``exp2``, which is vectorised, half
    as long.
    """
    if torch.is_grad_enabled():
        return F.elu(a)
    if a.device.type != "cpu":
        return F.elu_(a)
    return torch.maximum(a, a.clamp_max(0.0).mul_(_LOG2_E).exp2_().sub_(1.0), out=a)


def _elu_backward(grad: Tensor, activation: Tensor) -> Tensor:
    """``grad * elu'``, from the activation elu(a): 1 above zero, activation + 1 below; one pass over memory."""
    out: Tensor = torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, True, activation)
    return out


def _sigmoid_backward(grad: Tensor, output: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten.sigmoid_backward(grad, output)
    return out


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _phase_weight(weight: Tensor) -> Tensor:
    """Weight ``(in, out, 5, 5)`` of a transposed convolution of stride 2 as ``(4 out, in, 3, 3)`` of a convolution.

    With the input padded by 2, output pixel 2i + a = sum_t input[i - t] w[a + 2t] becomes phase a at place i.
    """
    inputs, outputs = weight.shape[:2]
    padded = F.pad(weight, (0, 1, 0, 1)).view(inputs, outputs, 3, 2, 3, 2)  # k = a + 2t  ->  (t, a)
    return padded.flip(2, 4).permute(3, 5, 1, 0, 2, 4).reshape(4 * outputs, inputs, 3, 3)


def _last_layer_taps(weight: Tensor) -> Tensor:
    """Weight ``(in, 1, 4, 4)`` of the last layer as ``(4 in, 3, 3, 4)``: input phase, shift (t), output phase.

    Output pixel 2j + b receives input pixel 2i + a through w[k] with a + k = 2t + b, where j = i + t.
    """
    inputs = weight.shape[0]
    taps = weight.new_zeros(2, 2, inputs, 3, 3, 2, 2)
    for row in range(2):
        for column in range(2):
            # k + a runs over 0..5 = (t, b)
            shifted = F.pad(weight[:, 0], (column, 2 - column, row, 2 - row)).view(inputs, 3, 2, 3, 2)
            taps[row, column] = shifted.permute(0, 1, 3, 2, 4)
    return taps.reshape(4 * inputs, 3, 3, 4)


def _phases_to_pixels(phases: Tensor, groups: int) -> Tensor:
    n, height, width, channels = phases.shape
    split = phases.reshape(n, height, width, groups, 2, 2, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return split.reshape(n, 2 * height, 2 * width, channels // 4)


def _pixels_to_phases(pixels: Tensor, groups: int) -> Tensor:
    n, height, width, channels = pixels.shape
    split = pixels.reshape(n, height // 2, 2, width // 2, 2, groups, -1).permute(0, 1, 3, 5, 2, 4, 6)
    return split.reshape(n, height // 2, width // 2, 4 * channels)


def _clear_pixel_25(phases: Tensor, groups: int) -> None:
    """Zero, in place, the 26th row and column that thirteen pairs have more than the 25 pixels of the third layer."""
    n, height, width, channels = phases.shape
    view = phases.view(n, height, width, groups, 2, 2, channels // (4 * groups))
    view[:, -1, :, :, 1] = 0.0
    view[:, :, -1, :, :, 1] = 0.0
