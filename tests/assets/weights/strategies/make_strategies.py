"""Writes MindSpore's strategy file of a training step of the tiny model, for 8 Ascend devices.

    python tests/assets/weights/strategies/make_strategies.py DATA_PARALLEL MODEL_PARALLEL FILE

Needs MindSpore's simulation mode (MS_SIMULATION_LEVEL=0, RANK_SIZE=8, RANK_ID=0): the graph is compiled, nothing runs.
dp4_mp2.ckpt and dp8.ckpt were made with MindSpore 2.9.0 and MindFormers 1.9.0, optimizer sharding on.
"""

from __future__ import annotations

import sys

import numpy as np

from llavanext_cli.config.architecture import Architecture, TextArchitecture, VisionArchitecture

TINY = Architecture(
    vision=VisionArchitecture(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
    ),
    text=TextArchitecture(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=256,
    ),
    image_token_index=61,
    video_token_index=60,
    image_grid_pinpoints=((28, 56), (56, 28), (56, 56)),
)


def write_strategy(data_parallel: int, model_parallel: int, file: str) -> None:
    import mindspore as ms
    from mindformers.core.optim import AdamW
    from mindformers.modules.transformer.transformer import TransformerOpParallelConfig
    from mindspore import Tensor, nn
    from mindspore.communication import init

    from llavanext_cli.model.config import LlavaNextConfig
    from llavanext_cli.model.registry import LlavaNext

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    init()
    split = [(data_parallel, *[1] * rest) for rest in (1, 4, 1, 1)]
    ms.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel",
        device_num=8,
        full_batch=False,
        dataset_strategy=tuple(split),
        enable_parallel_optimizer=True,
        parallel_optimizer_config={"parallel_optimizer_threshold": 0},
        strategy_ckpt_config={"save_file": file, "only_trainable_params": False},
    )
    sequence, tiles = 32, 3
    network = LlavaNext(
        LlavaNextConfig(
            architecture=TINY,
            target="Ascend",
            seq_length=sequence,
            tiles=tiles,
            parallel_config=TransformerOpParallelConfig(
                data_parallel=data_parallel, model_parallel=model_parallel, vocab_emb_dp=model_parallel == 1
            ),
        )
    )
    step = nn.TrainOneStepCell(network, AdamW(network.trainable_params(), learning_rate=1e-4)).set_train()
    ids = Tensor(np.zeros((1, sequence), np.int32))
    side = TINY.vision.image_size
    step.compile(ids, Tensor(np.zeros((1, tiles, 3, side, side), np.float32)), ids, ids)


if __name__ == "__main__":
    write_strategy(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
