"""Several CPU workers share each layer of the language model (tensor parallelism, Shoeybi et al. 2019).

    wq wk wv, w1 w3    [out, in]    a worker has some heads, some of the hidden units     rows of the weight
    wo, w2             [out, in]    and adds what they come to; an all-reduce sums up     columns of the weight

The cache is shared with the heads. Tower, embeddings and output matrix are whole on every worker. On Ascend MindSpore's
planner does all of this by the layers' own strategies; it has no such planner for a CPU.
"""

from __future__ import annotations

from mindspore import Tensor


def share_layers(language_model, rank: int, workers: int) -> None:
    """Keep the part of worker `rank` of each layer's filled weights; `decoder.Decoder` sums up."""
    for layer in language_model.model.layers:
        attention, forward = layer.attention, layer.feed_forward
        for linear in (attention.wq, attention.wk, attention.wv, forward.w1, forward.w3):
            linear.out_channels //= workers
            _keep(linear.weight, rank, linear.out_channels, axis=0)
        for linear in (attention.wo, forward.w2):
            linear.in_channels //= workers
            _keep(linear.weight, rank, linear.in_channels, axis=1)


def _keep(weight, rank: int, size: int, axis: int) -> None:
    whole = weight.asnumpy()
    part = whole[rank * size : (rank + 1) * size] if axis == 0 else whole[:, rank * size : (rank + 1) * size]
    weight.set_data(Tensor(part.copy()), slice_shape=True)
