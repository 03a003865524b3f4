"""The compiling worker with one strategy made wrong on purpose: the index of the fusion is not split, its table is."""

from llavanext_cli.model.fusion import Fusion
from llavanext_cli.simulation import compile_worker

right = Fusion.shard


def wrong(self, parallel_config):
    right(self, parallel_config)
    self.gather.shard(((parallel_config.data_parallel, 1, 1), (1, 1)))


Fusion.shard = wrong
compile_worker.main()
