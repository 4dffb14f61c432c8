"""Files that travel: who sends what to whom, in an order that cannot block, whatever the disks do."""

import hashlib
from collections import Counter
from itertools import accumulate

import pytest
from checkpoint_tools import on_ranks
from hypothesis import given
from hypothesis import strategies as st

from megatron_ds.checkpoint import fetch
from megatron_ds.checkpoint.fetch import Transfer, carry_out, copies, fetches
from megatron_ds.checkpoint.manifest import FileEntry

COUNTS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def nodes_of(counts):
    """Ranks of nodes with so many each."""
    return tuple(tuple(range(end - count, end)) for end, count in zip(accumulate(counts), counts))


def entry(content):
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def contents(name):
    """Something of any length, none included, that is another for each name."""
    return bytes(range(256))[: sum(name.encode()) % 23] + name.encode() * (len(name) % 3)


@given(COUNTS.filter(lambda counts: len(counts) > 1))
def test_every_file_is_copied_once_by_its_writer_to_the_next_node(counts):
    nodes = nodes_of(counts)
    shares = [{f"{rank}.{part}": entry(b"x") for part in range(rank % 3)} for rank in range(sum(counts))]
    transfers = copies(nodes, shares)
    assert Counter((t.source, t.name) for t in transfers) == Counter(
        (rank, name) for rank, share in enumerate(shares) for name in share
    )
    home = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    assert all(home[t.target] == (home[t.source] + 1) % len(nodes) for t in transfers)


@given(st.data())
def test_each_node_gets_what_it_lacks_once_from_one_that_has_it(data):
    nodes = nodes_of(data.draw(COUNTS))
    somewhere = st.sets(st.integers(0, len(nodes) - 1), min_size=1)
    holders = {f"f{n}": data.draw(somewhere) for n in range(data.draw(st.integers(0, 9)))}
    needs = [set(data.draw(st.lists(st.sampled_from(sorted(holders))))) if holders else set() for _ in nodes]
    files = {name: entry(name.encode()) for name in holders}
    transfers = fetches(nodes, holders, needs, files)
    home = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    assert Counter((home[t.target], t.name) for t in transfers) == Counter(
        (node, name) for node, its_needs in enumerate(needs) for name in its_needs if node not in holders[name]
    )
    assert all(home[t.source] in holders[t.name] and t.entry == files[t.name] for t in transfers)


def test_a_lost_node_is_served_by_all_ranks_of_its_neighbour():
    names = [f"f{n}" for n in range(8)]
    holders, files = {name: {1} for name in names}, dict.fromkeys(names, entry(b""))
    transfers = fetches(nodes_of([4, 4]), holders, [set(names), set()], files)
    assert [(t.source, t.target) for t in transfers] == [(4, 0), (5, 1), (6, 2), (7, 3)] * 2


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(fetch, "CHUNK_BYTES", 7)


@pytest.mark.parametrize("counts", [[1, 1], [1, 3], [3, 1, 2], [2, 2, 1, 3]], ids=str)
def test_copies_arrive_without_blocking_one_another(tmp_path, small_chunks, counts):
    nodes = nodes_of(counts)
    shares = [
        {name: entry(contents(name)) for name in (f"r{rank}", f"folder/{rank}", f"empty{rank}", "x" * rank + "y")}
        for rank in range(sum(counts))
    ]
    for rank in range(sum(counts)):
        for name in shares[rank]:
            path = tmp_path / f"from{rank}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents(name))

    def work(peers):
        (tmp_path / f"to{peers.node}").mkdir(exist_ok=True)
        carry_out(peers, copies(nodes, shares), tmp_path / f"from{peers.rank}", tmp_path / f"to{peers.node}")

    assert on_ranks(counts, work) == [None] * sum(counts)
    for node, ranks in enumerate(nodes):
        arrived = tmp_path / f"to{(node + 1) % len(nodes)}"
        sent = {name for rank in ranks for name in shares[rank]}
        assert {path.relative_to(arrived).as_posix() for path in arrived.rglob("*") if path.is_file()} == sent
        assert all((arrived / name).read_bytes() == contents(name) for name in sent)


@pytest.mark.parametrize("fault", ["gone", "shorter", "other", "longer", "refused"])
def test_a_fault_of_one_file_is_told_and_the_others_arrive(tmp_path, small_chunks, fault):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    content = bytes(range(40))
    for name in "abc":
        (tmp_path / "from" / name).write_bytes(content)
    changed = {"shorter": content[:30], "other": content[::-1], "longer": content + b"x"}
    if fault in changed:
        (tmp_path / "from/b").write_bytes(changed[fault])
    elif fault == "gone":
        (tmp_path / "from/b").unlink()
    else:
        (tmp_path / "to/b").mkdir()
    transfers = [Transfer(name, entry(content), 0, 1) for name in "abc"]

    def work(peers):
        carry_out(peers, transfers, tmp_path / "from", tmp_path / "to")

    sender, receiver = on_ranks([1, 1], work)
    assert all((tmp_path / "to" / name).read_bytes() == content for name in "ac")
    told = {
        "gone": ("b: [Errno 2] No such file", "b: arrived with another sha256"),
        "shorter": ("b: is shorter than it was", "b: arrived with another sha256"),
        "other": ("None", "b: arrived with another sha256"),
        "longer": ("None", "None"),  # what was listed is there; the next verification names the sender's file
        "refused": ("None", "b: [Errno 21] Is a directory"),
    }[fault]
    assert str(sender).startswith(told[0]) and str(receiver).startswith(told[1])
