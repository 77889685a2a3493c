"""The decoders of all classes, and the form in which they are fast.

``DecoderStack`` holds the weights as they are stored: four transposed convolutions a class with batch norm folded
in. ``ClassDecoder`` holds one class's weights in the layout that is fast, and knows the decoder's derivative, so that
latent descent needs no autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abs_defense.inference._elementwise import elu_backward, elu_of_sum, sigmoid_backward, whole_vectors

IMAGE_SHAPE = (1, 28, 28)
PIXELS = 784
KERNELS = (4, 5, 5, 4)
STRIDES = (1, 2, 2, 1)
_ROWS = 8  # of a product, for _product
# Measured on a CPU, in units of what one more latent costs.
_COST_OF_CALL = 6.0
_COST_OF_JOINT_CALL = 6.0
_COST_OF_JOINT_DECODING = 1.2


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

    The first layer acts on one pixel and is a matrix product. So is the last one, to its 16 taps, which are then added
    up at four shifts along the rows, and these sums at four along the columns. Between them channels come last, class
    after class, in G groups: in this layout the transposed convolutions, and the convolutions with the same weights
    that are their adjoints, are fast.

    All operations are differentiable, so the same code is unrolled when somebody wants gradients through the descent.

    Elsewhere than there a pair's result is the same to the bit, whatever else is computed in the same call, by one
    thread or several, alone or jointly, on CPUs where oneDNN and BLAS allow it.
    """

    w0: Tensor
    b0: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    w3_taps: Tensor
    b3: Tensor

    def _forward(self, latents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        g, n = latents.shape[:2]
        h0 = elu_of_sum(_product(latents, self.w0).contiguous(), self.b0, g).view(g, n, 16, -1)
        h0 = h0.permute(1, 2, 0, 3).reshape(n, 4, 4, -1).permute(0, 3, 1, 2)
        h1 = elu_of_sum(_transposed_convolution(h0, self.w1, g), self.b1)
        h2 = elu_of_sum(_transposed_convolution(h1, self.w2, g), self.b2)
        taps = self.w3_taps @ h2.permute(0, 2, 3, 1).reshape(n * 625, g, -1).permute(1, 2, 0)
        rows = taps.new_zeros(g, 4, n, 25, 28)
        for j, tap in enumerate(taps.view(g, 4, 4, n, 25, 25).unbind(2)):
            rows.narrow(4, j, 25).add_(tap)
        number = g * n * PIXELS
        padded = taps.new_zeros(whole_vectors(number, taps.device))
        sums = padded[:number].view(g, n, 28, 28).add_(self.b3)
        for i, row in enumerate(rows.unbind(1)):
            sums.narrow(2, i, 25).add_(row)
        return torch.sigmoid(padded)[:number].view(g, n, PIXELS), (h0, h1, h2)

    def _pullback(self, latents: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        decoded, (h0, h1, h2) = self._forward(latents)
        g, n = decoded.shape[:2]
        grad = self._last_adjoint(sigmoid_backward(gradient(decoded), decoded))
        grad = elu_backward(grad, h2)
        grad = elu_backward(F.conv2d(grad, self.w2, stride=2, groups=g), h1)
        grad = elu_backward(F.conv2d(grad, self.w1, stride=2, groups=g), h0)
        grad = grad.permute(0, 2, 3, 1).reshape(n, 16, g, -1).permute(2, 0, 1, 3).reshape(g, n, -1)
        return _product(grad, self.w0.transpose(1, 2))

    def _last_adjoint(self, grad: Tensor) -> Tensor:
        grad = grad.permute(1, 2, 0).flatten().view(-1, 28, 28, len(grad)).permute(0, 3, 1, 2)
        return F.conv2d(grad, self.w3, groups=grad.shape[1])

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
        self.w1, self.b1 = w1.contiguous(memory_format=torch.channels_last), b1[:, None, None]
        self.w2, self.b2 = w2.contiguous(memory_format=torch.channels_last), b2[:, None, None]
        self.w3 = w3.contiguous(memory_format=torch.channels_last)
        self.w3_taps = w3.reshape(1, w3.shape[0], -1).transpose(1, 2).contiguous()
        self.b3 = b3[None, None, None]

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

    For a few images up to five times as fast as class by class, because there the calls are what costs; for many
    slower, because the activations of all classes do not fit in a CPU's cache.
    """

    def __init__(self, decoders: Sequence[ClassDecoder]) -> None:
        for name in _Decoders.__annotations__:
            setattr(self, name, torch.cat([getattr(decoder, name) for decoder in decoders]))
        self.w3 = self.w3.transpose(2, 3).contiguous(memory_format=torch.channels_last)

    @classmethod
    def of(cls, decoders: Sequence[ClassDecoder]) -> JointDecoder | None:
        """None where there is nothing to join, or decoders of another kind."""
        joinable = len(decoders) > 1 and all(isinstance(decoder, ClassDecoder) for decoder in decoders)
        return cls(decoders) if joinable else None

    @staticmethod
    def is_faster(counts: Sequence[int]) -> bool:
        """Whether one pass is faster than one a class, for so many latents of each class: the largest count is what
        each that has any takes part with."""
        counts = [count for count in counts if count]
        one_pass = _COST_OF_JOINT_CALL + _COST_OF_JOINT_DECODING * len(counts) * max([0, *counts])
        return one_pass < sum(_COST_OF_CALL + count for count in counts)

    def _last_adjoint(self, grad: Tensor) -> Tensor:
        # For one channel oneDNN adds up the taps column by column, for several groups row by row: so on transposed
        # images the sums are the same to the bit.
        grad = grad.unflatten(2, (28, 28)).permute(1, 3, 2, 0).contiguous().permute(0, 3, 1, 2)
        return F.conv2d(grad, self.w3, groups=grad.shape[1]).transpose(2, 3)

    def __call__(self, latents: Tensor) -> Tensor:
        return self._forward(latents)[0]

    def squared_error_and_gradient(self, latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """||G(z) - x||^2 and its derivative: ``(G, N, L), (N, 784) or (G, N, 784) -> (G, N), (G, N, L)``."""
        return self._squared_error_and_gradient(latents, images)


def _transposed_convolution(image: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Of stride 2. With the bias inside, oneDNN takes a kernel several times as slow."""
    return F.conv_transpose2d(image, weight, stride=2, groups=groups)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of batches of matrices, where a row's result doesn't depend on how many there are: for a few rows left over
    BLAS takes another kernel."""
    rows = a.shape[1]
    missing = -rows % _ROWS
    return (F.pad(a, (0, 0, 0, missing)) @ b)[:, :rows] if missing else a @ b
