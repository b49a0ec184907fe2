"""One update of the parameters: learning rates, backward pass, clipping, optimiser."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from loraseg.tensor_types import Float, Tensor

__all__ = ["OptimiserStep", "RateSchedule", "is_due"]

# (peak rate, step) -> rate. Not a factor of the step alone: the order of the products decides the
# last bits of the rate, and published weights depend on them.
RateSchedule = Callable[[float, int], float]


class OptimiserStep:
    """Updates parameters with any optimiser and any schedule of the learning rate.

    All training loops of the package use it: those of adapters, of closed-set segmenters, and of
    the miniature models.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        rate: RateSchedule,
        *,
        clip_norm: float | None,
    ) -> None:
        """Take the peak rates from the optimiser's groups.

        Args:
            optimiser: Its groups' ``lr`` are the peak rates.
            parameters: All parameters whose gradients are clipped together.
            rate: The schedule.
            clip_norm: Largest L2 norm of all gradients together; None does not clip.
        """
        self.optimiser = optimiser
        self._parameters: Sequence[nn.Parameter] = list(parameters)
        self._peaks = [group["lr"] for group in optimiser.param_groups]
        self._rate, self._clip_norm = rate, clip_norm

    def set_rates(self, step: int) -> None:
        """Set the learning rates of a step, counted as the schedule counts."""
        for group, peak in zip(self.optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = self._rate(peak, step)

    def update(
        self,
        step: int,
        losses: Tensor | Iterable[Tensor],
        check_norm: Callable[[Float[Tensor, ""]], None] = lambda norm: None,
    ) -> None:
        """Make one step.

        Args:
            step: Number of the step.
            losses: The loss, or parts of it, each differentiated before the next is taken from the
                iterable: their gradients add up, and only one part's graph is in memory.
            check_norm: Called with the gradients' norm before clipping, ahead of the update; may
                raise.
        """
        self.set_rates(step)
        self.optimiser.zero_grad()
        for loss in (losses,) if isinstance(losses, Tensor) else losses:
            loss.backward()
        if self._clip_norm is not None:
            check_norm(nn.utils.clip_grad_norm_(self._parameters, self._clip_norm))
        self.optimiser.step()


def is_due(done: int, every: int, steps: int) -> bool:
    """Return whether something periodic is due after ``done`` steps; it is after the last one."""
    return done % every == 0 or done == steps
