"""What `torch.compile` needs of the Zipformer: operators for the compiled loops, and for what is decided by a draw when the code runs.

Compiled code holds no draws and no schedules. A regulariser is an operator that gets the number of its module, finds the module and lets it
decide; so one piece of code serves all layers and all batches. The numbers are CPU tensors: nothing waits for a GPU.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from spear.models.tracing import OPERATORS_READY
from spear.models.zipformer.attention import shift_to_offsets
from spear.models.zipformer.chance import keep_mask
from spear.models.zipformer.depthwise import depthwise_conv2d, gradients
from spear.models.zipformer.scheduled_float import ScheduledModule
from spear.models.zipformer.swoosh import Swoosh

_MODULES: weakref.WeakValueDictionary[int, ScheduledModule] = weakref.WeakValueDictionary()
_RANDOM = (torch.Tag.nondeterministic_seeded,)


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Let torch compile every layer (`training_unit`) inside `model`, in place, when it is first called.

    Names of parameters stay as they are. Batches of any size and length run through the same code, once for training and once for evaluation.

    Args:
        backend: of `torch.compile`.
    """
    OPERATORS_READY[0] = True
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for module in model.modules():
        if isinstance(module, ScheduledModule):
            number = next(_NUMBERS)
            _MODULES[number] = module
            module.handle = torch.tensor(number)
    for module in model.modules():
        if getattr(module, "training_unit", False):
            module.compile(dynamic=True, backend=backend)


_NUMBERS = iter(range(2**62))


@torch.library.custom_op("spear::pull", mutates_args=(), tags=_RANDOM)
def pull(grad: Tensor, x: Tensor, handle: Tensor) -> Tensor:
    """The gradient of x in place of `grad`, by the module with this number."""
    found = _MODULES[int(handle)].pull(x, grad)
    return found.clone(memory_format=torch.contiguous_format) if found is grad else found.contiguous()


@pull.register_fake
def _(grad: Tensor, x: Tensor, handle: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.custom_op("spear::keep", mutates_args=(), tags=_RANDOM)
def keep(x: Tensor, handle: Tensor, name: str, width: int, rescaled: bool) -> Tensor:
    """Zeros and ones (N, 1, width) with the rate `name` of the module with this number; the ones scaled up where `rescaled`."""
    module = _MODULES[int(handle)]
    rate = module.value(getattr(module, name))
    if rate <= 0.0:
        return x.new_ones(x.shape[0], 1, width)
    mask = keep_mask((x.shape[0], 1, width), rate, x)
    return mask / (1.0 - rate) if rescaled else mask


@keep.register_fake
def _(x: Tensor, handle: Tensor, name: str, width: int, rescaled: bool) -> Tensor:
    return x.new_empty(x.shape[0], 1, width)


@torch.library.custom_op("spear::swoosh", mutates_args=())
def swoosh(x: Tensor, shift: float, offset: float) -> Tensor:
    """Swoosh of x."""
    return Swoosh(shift, offset).of(x)


@torch.library.custom_op("spear::swoosh_gradient", mutates_args=())
def swoosh_gradient(x: Tensor, grad: Tensor, shift: float) -> Tensor:
    """`grad` times the derivative of Swoosh at x."""
    return Swoosh(shift, 0.0).gradient(x, grad)


@swoosh.register_fake
def _(x: Tensor, shift: float, offset: float) -> Tensor:
    return torch.empty_like(x)


@swoosh_gradient.register_fake
def _(x: Tensor, grad: Tensor, shift: float) -> Tensor:
    return torch.empty_like(x)


def _swoosh_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.shift = inputs[1]


swoosh.register_autograd(lambda ctx, grad: (swoosh_gradient(ctx.saved_tensors[0], grad, ctx.shift), None, None), setup_context=_swoosh_context)


@torch.library.custom_op("spear::depthwise", mutates_args=())
def depthwise(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Convolution of frames x (N, T, D) with a filter (D, 1, K) per channel."""
    return depthwise_conv2d(x.unsqueeze(1), weight.unsqueeze(2), bias, (0, padding)).squeeze(1).contiguous()


@torch.library.custom_op("spear::depthwise_gradients", mutates_args=())
def depthwise_gradients(x: Tensor, weight: Tensor, grad: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    found = gradients(x.unsqueeze(1), weight.unsqueeze(2), grad.unsqueeze(1), (0, padding))
    return found[0].squeeze(1).contiguous(), found[1].squeeze(2).to(weight.dtype).contiguous(), found[2].to(weight.dtype)


@depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] + 2 * padding - weight.shape[2] + 1, x.shape[2])


@depthwise_gradients.register_fake
def _(x: Tensor, weight: Tensor, grad: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _depthwise_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.padding = inputs[3]


depthwise.register_autograd(lambda ctx, grad: (*depthwise_gradients(*ctx.saved_tensors, grad, ctx.padding), None), setup_context=_depthwise_context)


@torch.library.custom_op("spear::add_shifted", mutates_args=())
def add_shifted(scores: Tensor, pos_scores: Tensor) -> Tensor:
    """See `spear.models.zipformer.attention.add_shifted`."""
    return scores + shift_to_offsets(pos_scores, scores.shape[-1])


@torch.library.custom_op("spear::shift_back", mutates_args=())
def shift_back(grad: Tensor, rows: int) -> Tensor:
    """Gradient of the position scores."""
    grad_pos = grad.new_zeros(*grad.shape[:3], rows)
    shift_to_offsets(grad_pos, grad.shape[-1]).copy_(grad)
    return grad_pos


@add_shifted.register_fake
def _(scores: Tensor, pos_scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape)


@shift_back.register_fake
def _(grad: Tensor, rows: int) -> Tensor:
    return grad.new_empty(*grad.shape[:3], rows)


add_shifted.register_autograd(
    lambda ctx, grad: (grad, shift_back(grad, ctx.rows)), setup_context=lambda ctx, inputs, output: setattr(ctx, "rows", inputs[1].shape[-1])
)
