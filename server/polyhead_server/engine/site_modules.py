"""Puts the adapters' work into the backbone's modules: each site's forward adds what the step's adapters do there."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from polyhead_core.kernels import dispatch
from polyhead_core.sites import Site, SiteKind, SiteMap
from polyhead_server.engine.batch import StepBatch


class CurrentStep:
    """The batch that is being computed; set by the runner around each forward, read by every site."""

    batch: StepBatch | None = None


class LinearSite:
    """y = W x + b, plus the low-rank products and biases of the rows' adapters."""

    def __init__(self, module: nn.Module, site: Site, step: CurrentStep) -> None:
        self._base = module.forward
        self._site = site
        self._step = step

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._base(x)
        batch = self._step.batch
        if batch is None or self._site.index not in batch.active_sites:
            return y
        slots = batch.logit_slots if self._site.is_head else batch.adapter_slots
        rows = y.view(-1, y.shape[-1])
        return dispatch.low_rank_add(rows, x.reshape(-1, x.shape[-1]), batch.tables, self._site.index, slots).view_as(y)


class EmbeddingSite:
    """y = E[token], plus the low-rank rows of the rows' adapters."""

    def __init__(self, module: nn.Module, site: Site, step: CurrentStep) -> None:
        self._base = module.forward
        self._site = site
        self._step = step

    def __call__(self, token_ids: Tensor) -> Tensor:
        y: Tensor = self._base(token_ids)
        batch = self._step.batch
        if batch is None or self._site.index not in batch.active_sites:
            return y
        rows = y.view(-1, y.shape[-1])
        return dispatch.embedding_add(
            rows, token_ids.reshape(-1), batch.tables, self._site.index, batch.adapter_slots, self._site.in_features
        ).view_as(y)


SiteForward = Callable[[Tensor], Tensor]
_SITE_FORWARD: dict[SiteKind, Callable[[nn.Module, Site, CurrentStep], SiteForward]] = {
    SiteKind.LINEAR: LinearSite,
    SiteKind.EMBED: EmbeddingSite,
    SiteKind.NORM: LinearSite,  # adapters have no rank pages there, only biases
}


def attach(model: nn.Module, sites: SiteMap, step: CurrentStep) -> None:
    """Gives every site's module the adapter-aware forward. The instances change, no class does."""
    for site in sites:
        module = model.get_submodule(site.path)
        module.forward = _SITE_FORWARD[site.kind](module, site, step)
