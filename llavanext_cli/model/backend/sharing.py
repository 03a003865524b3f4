"""Several CPU workers share each layer of the language model (tensor parallelism, Shoeybi et al. 2019).

    wq wk wv, w1 w3    [out, in]    a worker has some of the heads and hidden units    rows of the weight
    wo, w2             [out, in]    and their part of the output; an all-reduce adds   columns of the weight

The cache is split with the heads. Tower, embeddings and output matrix are whole on every worker. On Ascend, MindSpore's
planner does all of this by the layers' sharding strategies; it has no planner for CPUs.
"""

from __future__ import annotations

from mindspore import Tensor


def share_layers(language_model, rank: int, workers: int) -> None:
    """Reduce each layer's loaded weights to the part of worker `rank`; `decoder.CachedLayer` adds the results."""
    for layer in language_model.model.layers:
        attention, forward = layer.attention, layer.feed_forward
        for linear in (attention.wq, attention.wk, attention.wv, forward.w1, forward.w3):
            linear.out_channels //= workers
            _slice_weight(linear.weight, rank, linear.out_channels, axis=0)
        for linear in (attention.wo, forward.w2):
            linear.in_channels //= workers
            _slice_weight(linear.weight, rank, linear.in_channels, axis=1)


def _slice_weight(weight, rank: int, size: int, axis: int) -> None:
    whole = weight.asnumpy()
    part = whole[rank * size : (rank + 1) * size] if axis == 0 else whole[:, rank * size : (rank + 1) * size]
    weight.set_data(Tensor(part.copy()), slice_shape=True)
