"""Cross-entropy, and measures, that never hold the full logits: a chunk of label positions goes through the LM head at
a time.

    N label positions, V vocabulary, H hidden size, C positions in a chunk

The gradient of each chunk is computed in the forward pass, as long as its logits are there (as Liger's fused linear
cross-entropy does, Hsu et al. 2024): nothing is computed twice, and what is kept for backward is [N, H].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers.modeling_outputs import BaseModelOutputWithPast

from polyhead_trainer.batching import Batch
from polyhead_trainer.objectives.label_logits import label_logits, run_to_labels, whole_model

Found = TypeVar("Found")


def chunked_loss_sum(model: nn.Module, batch: Batch, chunk_rows: int) -> Tensor:
    """The cross-entropy of the label tokens, summed; equal to F.cross_entropy of `label_logits`, reduction="sum"."""
    (loss,) = chunked_loss_sums(model, batch, chunk_rows, [batch.num_labels])
    return loss


def chunked_loss_sums(model: nn.Module, batch: Batch, chunk_rows: int, sizes: Sequence[int]) -> list[Tensor]:
    """As chunked_loss_sum, apart for runs of `sizes` label tokens. `chunk_rows`: C."""
    head, hidden_NH, logits_of = _halves(model, batch)

    def loss_of(hidden_CH: Tensor, targets_C: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(hidden_CH), targets_C, reduction="sum")

    runs = zip(hidden_NH.split(list(sizes)), batch.targets_N.split(list(sizes)), strict=True)
    return [in_chunks(loss_of, hidden_NH, targets_N, chunk_rows, head) for hidden_NH, targets_N in runs]


def over_label_logits(model: nn.Module, batch: Batch, limit: int, of: Callable[[Tensor, slice], Found]) -> list[Found]:
    """`of(logits_CV, rows)` for all label tokens, in order: parts of `label_logits` and the rows of [N] that they are.

    `limit`: most logits in a part; 0: all in one. A part is gone before the next is there; to be called without
    gradients, which would keep all of them.
    """
    rows = chunk_rows(limit, batch.num_labels, cast(Any, model).config.vocab_size)
    if rows is None:
        return [of(label_logits(model, batch), slice(0, batch.num_labels))]
    _, hidden_NH, logits_of = _halves(model, batch)
    parts = [slice(start, start + rows) for start in range(0, batch.num_labels, rows)]
    return [of(logits_of(hidden_NH[part]), part) for part in parts]


def in_chunks(
    loss_of: Callable[[Tensor, Tensor], Tensor], hidden_NH: Tensor, targets_N: Tensor, chunk_rows: int, head: nn.Module
) -> Tensor:
    """The sum over chunks of `loss_of(hidden_CH, targets_C)`, which puts hidden states through `head`."""
    if torch.is_grad_enabled():
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        return _ChunkedLoss.apply(loss_of, chunk_rows, targets_N, hidden_NH, *parameters)  # type: ignore[no-untyped-call,no-any-return]
    parts = zip(hidden_NH.split(chunk_rows), targets_N.split(chunk_rows), strict=True)
    return torch.stack([loss_of(hidden_CH, targets_C) for hidden_CH, targets_C in parts]).sum()


def chunk_rows(limit: int, num_labels: int, vocabulary: int) -> int | None:
    """C, so that C x V stays within `limit` logits; None where all of them do, or `limit` is 0."""
    if limit == 0 or num_labels * vocabulary <= limit:
        return None
    return max(1, limit // vocabulary)


def _halves(model: nn.Module, batch: Batch) -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """(LM head, what it is given for the label tokens [N, H], from such rows [C, H] to logits [C, vocabulary] in
    float32).

    The model's own forward computes both halves, so that what an architecture does to its logits (scaling, soft
    capping) and what an adapter does to the head is done here as well.
    """
    causal_lm = whole_model(model)
    head: nn.Module = causal_lm.get_output_embeddings()

    def logits_of(hidden_CH: Tensor) -> Tensor:
        with _decoder_returns(causal_lm, hidden_CH.unsqueeze(0)):
            output = causal_lm.forward(input_ids=batch.token_ids_BT[:1, :1], use_cache=False)
        return cast(Tensor, output.logits)[0].float()

    return head, _rows_before_head(model, head, batch), logits_of


def _rows_before_head(model: nn.Module, head: nn.Module, batch: Batch) -> Tensor:
    """Hidden states [N, H] that the head is given."""
    taken: list[Tensor] = []

    def take(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        taken.append(hidden)
        return hidden[..., :1]

    with forward_replaced(head, take):
        run_to_labels(model, batch)
    (hidden,) = taken
    return hidden.reshape(-1, hidden.shape[-1])


def _decoder_returns(causal_lm: Any, hidden: Tensor) -> Any:
    output = BaseModelOutputWithPast(last_hidden_state=hidden)
    return forward_replaced(causal_lm.get_decoder(), lambda *_, **__: output)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own


class _ChunkedLoss(torch.autograd.Function):
    """loss(hidden, parameters), with both gradients ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        rows: int,
        targets_N: Tensor,
        hidden_NH: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        hidden_NH = hidden_NH.detach()
        grad_NH = torch.empty_like(hidden_NH)
        sums: list[Tensor | None] = [None] * len(parameters)
        total = torch.zeros((), device=hidden_NH.device)
        for start in range(0, len(hidden_NH), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                hidden_CH = hidden_NH[part].requires_grad_()
                loss = loss_of(hidden_CH, targets_N[part])
            gradients = torch.autograd.grad(loss, [hidden_CH, *parameters], allow_unused=True)
            total += loss.detach()
            grad_NH[part] = gradients[0]
            _add(sums, gradients[1:])
        ctx.gradients = (grad_NH, *sums)  # type: ignore[attr-defined]
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        gradients: tuple[Tensor | None, ...] = ctx.gradients  # type: ignore[attr-defined]
        # Scaled in place, so good for one backward pass; a second one fails on the missing attribute.
        del ctx.gradients  # type: ignore[attr-defined]
        return None, None, None, *(None if gradient is None else gradient.mul_(g) for gradient in gradients)


def _add(sums: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            held = sums[index]
            sums[index] = gradient if held is None else held.add_(gradient)
