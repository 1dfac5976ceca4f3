"""Muon for the matrices of a model's layers, and AdamW for its other weights, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix by the nearest orthogonal matrix to
its momentum. Scaled by 0.2 · √(larger side), as in Moonlight (arXiv 2502.16982), a step is about as large as AdamW's,
so that one learning rate serves both. `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` computes the same a matrix at
a time; here matrices of one shape go through the iteration together, which small models need: they would otherwise wait
for thousands of small kernels in every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from moba_lab.train.recipe import Recipe

# Of the quintic that drives all singular values towards 1, in five steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


class Muon(Optimizer):
    """Muon for the groups that say "muon": True, whose weights are matrices, AdamW for the others.

    Args:
        groups: of parameters. lr, weight_decay: of both. momentum: Muon's. betas, eps: AdamW's.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "muon": False}
        super().__init__(groups, defaults)
        # It shares its groups and state with this optimizer, which is what schedulers and checkpoints see.
        others = [group for group in self.param_groups if not group["muon"]]
        is_cuda = any(p.is_cuda for group in others for p in group["params"])
        self._adamw = AdamW(others, lr=lr, betas=betas, eps=eps, fused=is_cuda) if others else None
        self._share()

    def _share(self) -> None:
        if self._adamw is not None:
            self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        super().load_state_dict(state_dict)
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step.

        Raises:
            ValueError: if weights are sharded: orthogonal matrices need them whole.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                self._step(group)
        if self._adamw is not None:
            self._adamw.step()
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for p in group["params"]:
            if isinstance(p, DTensor):
                raise ValueError("optimizer='muon' needs whole matrices, and these weights are sharded: use 'adamw'")
            if p.grad is not None:
                by_shape.setdefault((*p.shape,), []).append(p)
        for shape, weights in by_shape.items():
            grads = [p.grad for p in weights if p.grad is not None]
            states = [self.state[p] for p in weights]
            for state, p in zip(states, weights, strict=True):
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            # Nesterov's.
            ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
            updates = orthogonal(torch.stack(ahead)).to(weights[0].dtype).unbind()
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring all singular values of [N, R, C] near 1 (0.7 … 1.2), in bf16, as Muon does."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def make_muon(model: nn.Module, *, lr: float, weight_decay: float, beta2: float) -> Muon:
    """Muon for all matrices but embeddings and the output layer.

    Weights that are no matrices (norms, biases) do not decay, as with transformers' Trainer.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        tables.add(id(head.weight))
    learned = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learned if p.ndim == 2 and id(p) not in tables], "muon": True},
        {"params": [p for p in learned if id(p) in tables or p.ndim > 2]},
        {"params": [p for p in learned if id(p) not in tables and p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return Muon(groups, lr=lr, weight_decay=weight_decay, betas=(0.9, beta2))


def make_optimizer(recipe: Recipe, model: nn.Module) -> Muon | None:
    """The recipe's optimizer where Trainer does not know it; None where Trainer makes its own."""
    training = recipe.training
    if training.optimizer == "adamw":
        return None
    return make_muon(model, lr=training.learning_rate, weight_decay=training.weight_decay, beta2=training.beta2)


class LearningSchedule(NamedTuple):
    """The learning rate over the steps: one of transformers' schedulers by name, and its options."""

    name: str
    options: dict[str, Any]
    num_warmup_steps: int


def learning_schedule(recipe: Recipe) -> LearningSchedule:
    """The recipe's."""
    name, options = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        "linear": ("linear", {}),
        "constant": ("constant_with_warmup", {}),
        "wsd": ("warmup_stable_decay", {"num_decay_steps": max(1, recipe.num_steps // 5), "min_lr_ratio": 0.1}),
    }[recipe.training.learning_schedule]
    return LearningSchedule(name, options, round(recipe.training.warmup * recipe.num_steps))
