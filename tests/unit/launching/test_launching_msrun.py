"""The machines of a run, as a user names them."""

import pytest

from llavanext_cli.errors import ConfigError
from llavanext_cli.launching.msrun import Nodes, parse_master

MASTER = ("10.0.0.1", 8118)


def test_a_master_is_an_address_and_a_port():
    assert parse_master("10.0.0.1:8118") == MASTER


@pytest.mark.parametrize("text", ["here", "10.0.0.1", "10.0.0.1:", ":8118", "10.0.0.1:port", "10.0.0.1:70000"])
def test_an_invalid_master(text):
    with pytest.raises(ConfigError, match=f"--master {text}: not ADDRESS:PORT"):
        parse_master(text)


@pytest.mark.parametrize(
    ("nodes", "what"),
    [
        ((2, 2, MASTER), "node 2 of 2 does not exist"),
        ((1, 1), "node 1 of 1 does not exist"),
        ((2,), "--nodes needs --master"),
        ((1, 0, MASTER), "--master is for several nodes"),
    ],
)
def test_nodes_that_contradict_each_other(nodes, what):
    with pytest.raises(ConfigError, match=what):
        Nodes(*nodes)


def test_each_node_has_its_share_of_the_ranks():
    assert [list(Nodes(2, rank, MASTER).ranks(8)) for rank in (0, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
