"""ScaledAdam: Adam whose steps are relative to each tensor's size, and which learns that size as well.

Source: arXiv:2310.11230, section 3.5; arithmetic as in icefall's ScaledAdam (Apache-2.0), rewritten from a description of it.
Letters: B tensors of one shape updated together, S steps between size updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spear.bounds import above, at_least
from spear.errors import ConfigError
from spear.training.optim.base import OptimizerConfig, check_betas, parameter_groups
from spear.training.optim.clipping import Variant, clip_factor, clip_state
from spear.training.optim.kernels import Moments, ScaledAdamLoops, scaled_adam_loops
from spear.training.sharding import is_sharded, local, part_like, sum_over

BIAS_CORRECTED_BELOW = 0.99
SIZE_STEP_LIMIT = 0.1
ALONE_FROM = 1 << 14
"""On a CPU tensors of so many elements are updated alone: copying them into a stack costs more than it saves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledAdamConfig(OptimizerConfig):
    """Settings of ScaledAdam; defaults of SPEAR (arXiv:2510.25955). It has no weight decay."""

    lr: float = 0.045
    """Base learning rate, relative to the root mean square of each tensor."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the momentum and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    scalar_lr_scale: float = 0.1
    """Learning rate of one-element tensors and of tensor sizes, relative to `lr`."""
    param_min_rms: float = 1e-5
    """Smallest size a tensor is taken to have."""
    param_max_rms: float = 3.0
    """Largest size the size update goes to."""
    scalar_max: float = 10.0
    """One-element tensors are kept within plus and minus this."""
    size_update_period: int = 4
    """S, updates between two size updates."""
    clipping_scale: float | None = 2.0
    """Gradient norms above this many times their median are clipped; null: no clipping."""
    clipping_update_period: int = 100
    """Updates over which the median is taken."""
    variant: Variant = "fork"
    """`fork` is what SPEAR was trained with, `master` is current icefall."""

    def __post_init__(self) -> None:
        check_betas(self.betas)
        for name in ("lr", "eps", "scalar_lr_scale", "param_min_rms", "param_max_rms", "scalar_max"):
            above(name, getattr(self, name), 0)
        for name in ("size_update_period", "clipping_update_period"):
            at_least(name, getattr(self, name), 1)
        if self.clipping_scale is not None:
            above("clipping_scale", self.clipping_scale, 0)
        if self.variant not in ("fork", "master"):
            raise ConfigError(f"`variant` must be fork or master, but is {self.variant!r}")

    def build(self, module: nn.Module) -> Optimizer:
        """ScaledAdam over the parameters of `module` that need a gradient, grouped by `lr_scale`."""
        return ScaledAdam(parameter_groups(module, self.lr), self)


@dataclass(slots=True)
class Sizes:
    """What a stack remembers about the sizes of its tensors."""

    rms: Tensor
    """(B, 1, ...) root mean square of each tensor, renewed every S updates."""
    exp_avg_sq: Tensor
    """(B, 1, ...) second moment of the gradients of the sizes."""
    grads: Tensor
    """(S, B, 1, ...) the last S gradients of the sizes."""


@dataclass(slots=True)
class Stack:
    """Tensors of one shape and type with their optimiser state, batched on a new first axis.

    Of tensors that are spread over processes (see `spear.training.sharding`) it holds this process's parts; sizes are those of the whole.
    """

    params: list[Tensor]
    """B tensors."""
    delta: Tensor
    """(B, ...) momentum of the updates."""
    exp_avg_sq: Tensor
    """(B, ...) second moment of the gradients."""
    sizes: Sizes | None
    """None for one-element tensors."""
    loops: ScaledAdamLoops | None = None
    """Set where one large tensor is updated by compiled loops."""
    moments: Moments | None = None
    """Sums over the tensor and its gradient, valid within one update."""

    def values(self) -> Tensor:
        """(B, ...) the tensors' values; a view of the only one, else a copy."""
        return local(self.params[0]).unsqueeze(0) if len(self.params) == 1 else torch.stack([local(p) for p in self.params])

    def gradients(self) -> Tensor:
        """(B, ...) the tensors' gradients, zeros where there is none."""
        grads = [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in self.params]
        return grads[0].unsqueeze(0) if len(grads) == 1 else torch.stack(grads)

    def add(self, values: Tensor) -> None:
        """Move the tensors to `values` + delta."""
        self.put(values + self.delta)

    def put(self, values: Tensor) -> None:
        """Set the tensors' values."""
        torch._foreach_copy_([local(p) for p in self.params], list(values.unbind(0)))

    def sum(self, values: Tensor) -> Tensor:
        """(B, 1, ...) sums of values (B, ...) over each whole tensor."""
        return sum_over(values.sum(dim=list(range(1, values.ndim)), keepdim=True), self.params[0])

    def rms(self, values: Tensor) -> Tensor:
        """(B, 1, ...) root mean squares of values (B, ...) over each whole tensor."""
        if is_sharded(self.params[0]):
            return (self.sum(values.square()) / self.params[0].numel()).sqrt()
        return values.square().mean(dim=list(range(1, values.ndim)), keepdim=True).sqrt()


class ScaledAdam(Optimizer):
    """ScaledAdam over groups of parameters.

    Statistics are per tensor; stacking equal shapes only saves kernel launches. ``state`` holds views of the stacks for each
    parameter, so a ``state_dict`` has one entry per parameter and survives parameters that come or go.
    A limit on gradient norms that is switched on after a resume takes effect at the first full period.

    Args:
        groups: dicts with ``params`` and ``lr``. config: the rest.
    """

    def __init__(self, groups: list[dict[str, Any]], config: ScaledAdamConfig) -> None:
        self.config = config
        self._stacks: list[list[Stack]] = []
        super().__init__(groups, {"lr": config.lr, "step": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it starts with an empty state."""
        super().add_param_group({**clip_state(self.config.clipping_update_period), **param_group})
        self._stacks = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        super().load_state_dict(state_dict)
        self._stacks = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients that are there; a missing gradient counts as zeros."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._stacks:
            self._stacks = [self._stack(group["params"]) for group in self.param_groups]
        for group, stacks in zip(self.param_groups, self._stacks):
            clip = self._clip(group, stacks)
            for stack in stacks:
                if stack.sizes is not None and stack.loops is not None and clip > 0.0 and stack.params[0].grad is not None:
                    self._update_alone(stack, stack.sizes, stack.loops, clip, float(group["lr"]), int(group["step"]))
                    continue
                grad = stack.gradients()
                if clip == 0.0:
                    grad = torch.zeros_like(grad)
                elif clip != 1.0:
                    grad = grad * clip
                if stack.sizes is None:
                    self._update_scalars(stack, grad, float(group["lr"]), int(group["step"]))
                else:
                    self._update(stack, stack.sizes, grad, float(group["lr"]), int(group["step"]))
            group["step"] += 1
        return loss

    def _clip(self, group: dict[str, Any], stacks: list[Stack]) -> float:
        if self.config.clipping_scale is None or group["step"] == 0:
            return 1.0
        weight = self.config.scalar_lr_scale if self.config.variant == "master" else 1.0
        squares = []
        for stack in stacks:
            factor = weight if stack.sizes is None else stack.sizes.rms
            if stack.sizes is not None and stack.loops is not None and stack.params[0].grad is not None:
                stack.moments = stack.loops.moments(stack.params[0], stack.params[0].grad)
                squares.append(stack.sizes.rms.square().sum() * stack.moments.gg)
            else:
                squares.append(sum_over((stack.gradients() * factor).square().sum(), stack.params[0]))
        norm = float(torch.stack(squares).sum().sqrt())
        return clip_factor(group, norm, step=int(group["step"]), clipping_scale=self.config.clipping_scale, variant=self.config.variant)

    def _update(self, stack: Stack, sizes: Sizes, grad: Tensor, lr: float, step: int) -> None:
        (beta1, beta2), eps = self.config.betas, self.config.eps
        values = stack.values()
        stack.delta.mul_(beta1)
        period = self.config.size_update_period
        sizes.grads[step % period] = stack.sum(values * grad)
        if step % period == period - 1:
            sizes.rms.copy_(stack.rms(values))
            if step > 0:
                stack.delta.add_(values * self._size_step(sizes, lr, step), alpha=1 - beta1)
        stack.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = self._second_moment(stack, step).sqrt().add_(eps)
        size = sizes.rms.clamp(min=self.config.param_min_rms)
        stack.delta.add_(grad / denominator * size, alpha=-lr * (1 - beta1))
        stack.add(values)

    def _update_alone(self, stack: Stack, sizes: Sizes, loops: ScaledAdamLoops, clip: float, lr: float, step: int) -> None:
        """`_update` of one tensor by compiled loops."""
        (beta1, beta2), period = self.config.betas, self.config.size_update_period
        p, grad = stack.params[0], stack.params[0].grad
        assert grad is not None
        grad = grad.contiguous()
        moments, stack.moments = stack.moments or loops.moments(p, grad), None
        sizes.grads[step % period] = clip * moments.pg
        pull = 0.0
        if step % period == period - 1:
            sizes.rms.fill_(math.sqrt(moments.pp / p.numel()))
            if step > 0:
                pull = (1 - beta1) * float(self._size_step(sizes, lr, step))
        size = max(float(sizes.rms), self.config.param_min_rms)
        correction = 1 - beta2 ** (step + 1)
        correction = 1 / correction if correction < BIAS_CORRECTED_BELOW else 1.0
        settings = (beta1, beta2, self.config.eps, correction, clip, pull, -lr * (1 - beta1) * size)
        loops.update(p, grad, stack.delta, stack.exp_avg_sq, settings)

    def _size_step(self, sizes: Sizes, lr: float, step: int) -> Tensor:
        """(B, 1, ...) relative change of each tensor's size."""
        period = self.config.size_update_period
        decay = self.config.betas[1] ** period
        sizes.exp_avg_sq.mul_(decay).add_(sizes.grads.square().mean(dim=0), alpha=1 - decay)
        correction = math.sqrt(1 - decay ** ((step + 1) // period))
        change = sizes.grads.sum(dim=0) / sizes.exp_avg_sq.sqrt().add_(self.config.eps)
        change.mul_(-lr * self.config.scalar_lr_scale * correction)
        change.masked_fill_(sizes.rms < self.config.param_min_rms, 0.0)
        if self.config.variant == "master":
            change.clamp_(-SIZE_STEP_LIMIT, SIZE_STEP_LIMIT)
        return torch.minimum(change, (self.config.param_max_rms - sizes.rms) / sizes.rms)

    def _second_moment(self, stack: Stack, step: int) -> Tensor:
        correction = 1 - self.config.betas[1] ** (step + 1)
        return stack.exp_avg_sq / correction if correction < BIAS_CORRECTED_BELOW else stack.exp_avg_sq.clone()

    def _update_scalars(self, stack: Stack, grad: Tensor, lr: float, step: int) -> None:
        (beta1, beta2), eps, limit = self.config.betas, self.config.eps, self.config.scalar_max
        values = stack.values()
        stack.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if self.config.variant == "master":
            moment = self._second_moment(stack, step)
        else:
            moment = stack.exp_avg_sq / (1 - beta2 ** (step + 1))
        stack.delta.mul_(beta1).add_(grad / moment.sqrt().add_(eps), alpha=-lr * self.config.scalar_lr_scale * (1 - beta1))
        if self.config.variant == "master":
            stack.put((values + stack.delta).clamp_(-limit, limit))
        else:
            stack.add(values.clamp(-limit, limit))

    def _stack(self, params: list[Tensor]) -> list[Stack]:
        """Batch parameters of one type, place and shape; takes over the state that is there, starts the rest."""
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for number, p in enumerate(params):
            alone = number if p.device.type == "cpu" and p.numel() >= ALONE_FROM else -1
            alike.setdefault((str(p.dtype), f"{p.device}{' spread' * is_sharded(p)}", *p.shape, alone), []).append(p)
        stacks = []
        for key in sorted(alike):
            same = alike[key]
            states = [self.state[p] or self._fresh_state(p) for p in same]
            sizes = None
            if same[0].numel() > 1:
                sizes = Sizes(
                    rms=torch.stack([s["param_rms"] for s in states]),
                    exp_avg_sq=torch.stack([s["scale_exp_avg_sq"] for s in states]),
                    grads=torch.stack([s["scale_grads"] for s in states], dim=1),
                )
            delta, exp_avg_sq = (torch.stack([local(s[name]) for s in states]) for name in ("delta", "exp_avg_sq"))
            stack = Stack(same, delta, exp_avg_sq, sizes)
            if key[-1] >= 0 and not is_sharded(same[0]) and same[0].dtype == torch.float32 and same[0].is_contiguous():
                stack.loops = scaled_adam_loops()
            for i, p in enumerate(same):
                self.state[p] = _view(stack, i)
            stacks.append(stack)
        return stacks

    def _fresh_state(self, p: Tensor) -> dict[str, Tensor]:
        state = {"delta": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        if p.numel() > 1:
            mean = sum_over(local(p).square().sum(), p) / p.numel() if is_sharded(p) else p.square().mean()
            state["param_rms"] = mean.sqrt().reshape([1] * p.ndim)
            state["scale_exp_avg_sq"] = torch.zeros_like(state["param_rms"])
            state["scale_grads"] = state["param_rms"].new_zeros([self.config.size_update_period, *state["param_rms"].shape])
        return state


def _view(stack: Stack, i: int) -> dict[str, Tensor]:
    p = stack.params[i]
    state = {"delta": part_like(stack.delta[i], p), "exp_avg_sq": part_like(stack.exp_avg_sq[i], p)}
    if stack.sizes is not None:
        state |= {"param_rms": stack.sizes.rms[i], "scale_exp_avg_sq": stack.sizes.exp_avg_sq[i], "scale_grads": stack.sizes.grads[:, i]}
    return state
