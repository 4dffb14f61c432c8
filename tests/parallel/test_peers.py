"""Peers on real ranks: who shares a node, meeting and sending while the main thread uses other groups."""

from ranks import run_ranks


def talk(groups, ranks_per_node):
    """Nodes, what everyone gathered on a thread during collectives of training, and what came from the left."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from megatron_ds.parallel.peers import NodePeers

    peers = NodePeers.build(ranks_per_node)

    def background():
        right, left = (peers.rank + 1) % peers.world_size, (peers.rank - 1) % peers.world_size
        sent, received = torch.full((peers.rank + 3,), peers.rank, dtype=torch.uint8), None
        for sender in range(peers.world_size):
            if sender == peers.rank:
                peers.send(sent, right)
            elif sender == left:
                received = peers.receive(left + 3, left)
        peers.send(torch.empty(0, dtype=torch.uint8), right)
        assert peers.receive(0, left).numel() == 0
        return peers.gather_objects((peers.rank, peers.node)), received.tolist()

    with ThreadPoolExecutor(1) as thread:
        work = [thread.submit(background) for _ in range(5)]
        sums = [groups.sum_over_world(torch.ones(1000)).max().item() for _ in range(50)]
        results = [future.result() for future in work]
    assert all(result == results[0] for result in results)
    assert set(sums) == {float(peers.world_size)}
    return peers.nodes, peers.node, peers.node_ranks, *results[0]


def test_two_nodes_of_two():
    for rank, (nodes, node, ranks, gathered, received) in enumerate(run_ranks(talk, 4, 2)):
        assert nodes == ((0, 1), (2, 3))
        assert (node, ranks) == (rank // 2, nodes[rank // 2])
        assert gathered == [(0, 0), (1, 0), (2, 1), (3, 1)]
        left = (rank - 1) % 4
        assert received == [left] * (left + 3)


def test_one_launcher_is_one_node_and_nodes_may_be_uneven():
    assert {result[0] for result in run_ranks(talk, 4, None)} == {((0, 1, 2, 3),)}
    assert {result[0] for result in run_ranks(talk, 4, 3)} == {((0, 1, 2), (3,))}
