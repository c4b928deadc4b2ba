"""What the ranks of one run hold, played by one process that communicates with nobody: the gradients' places, what
DDP keeps beside them, and what the optimizer steps on. FSDP's part is `shards`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from polyhead_trainer.estimate.dry_run import DryRun
from polyhead_trainer.optimizers import Groups


class Alone:
    """One process, which has all of it; the others change what they do otherwise."""

    def __init__(self, dry: DryRun, parameters: Sequence[nn.Parameter]) -> None:
        """`parameters`: the trained ones, emptied."""
        self.dry = dry
        self.parameters = parameters
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._after_accumulation)

    @property
    def stepped(self) -> list[nn.Parameter]:
        """The trained parameters as this rank's optimizer is given them."""
        return [self._stepped(parameter) for parameter in self.parameters]

    def stepped_groups(self, groups: Groups) -> Groups:
        """`groups` of the trained parameters as this rank's optimizer is given them."""
        return [{**group, "params": [self._stepped(one) for one in group["params"]]} for group in groups]

    def after_backward(self) -> None:
        """What happens at the end of a backward pass."""

    def after_forward(self) -> None:
        """What happens after passes that no backward pass follows."""

    def before_update(self) -> None:
        """Leaves the gradients as the optimizer finds them."""

    def drop_gradients(self) -> None:
        for parameter in self.stepped:
            parameter.grad = None

    def _stepped(self, parameter: nn.Parameter) -> nn.Parameter:
        return parameter

    def _after_accumulation(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.dry.count_as(parameter.grad, "gradients")


class Replicas(Alone):
    """DDP: gradients meet those of other ranks in buckets, which are there for as long as the model is.

    A backward pass makes each gradient outside of its bucket and moves it there; where a step takes several passes, all
    of them wait outside for the last one.
    """

    def __init__(self, dry: DryRun, parameters: Sequence[nn.Parameter], *, accumulates: bool) -> None:
        super().__init__(dry, parameters)
        self._accumulates = accumulates
        dry.hold(sum(parameter.nbytes for parameter in parameters), "gradients")

    def before_update(self) -> None:
        for parameter in self.parameters:
            parameter.grad = self.dry.uncounted(parameter.shape, parameter.dtype)

    def _after_accumulation(self, parameter: Tensor) -> None:
        super()._after_accumulation(parameter)
        if not self._accumulates:
            parameter.grad = None
