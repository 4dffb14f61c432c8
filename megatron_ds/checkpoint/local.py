"""The node-local tier: a checkpoint spread over the disks of the nodes, each of which keeps what its ranks own.

Node k works in ``node{k}/`` of a directory that is on its own disk. All ranks write, and agree that every part is
complete; then the first rank of each node, its leader, renames the node's part. Until all have done so the save before
is kept, so a crash between two nodes costs the new checkpoint and no other. A copy of each part on the next node, if
asked for, outlives a lost disk. ``parts`` says what of all that makes a whole checkpoint. To read one, each node
fetches from the others the files it needs and lacks.
"""

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Unpack

from megatron_ds.checkpoint.agreement import NodePeers, agree, on_leaders, on_rank_0
from megatron_ds.checkpoint.fetch import carry_out, copies, fetches
from megatron_ds.checkpoint.manifest import FileEntry, Manifest, NodePart, sync_directory
from megatron_ds.checkpoint.parts import (
    NEIGHBOUR,
    Part,
    Save,
    Whole,
    assemble,
    complete_saves,
    current,
    list_parts,
    merged,
)
from megatron_ds.checkpoint.pieces import Fragment
from megatron_ds.checkpoint.reader import CONFIG, TRAINER, Checkpoint
from megatron_ds.checkpoint.writing import (
    MAX_FILE_BYTES,
    Content,
    SaveReport,
    complete,
    discard,
    documents,
    remove,
    summary,
    write_extras,
    write_share,
)
from megatron_ds.errors import CheckpointError


class LocalStore:
    """The checkpoints of one run on the disks of its nodes. Every method is called by every rank."""

    def __init__(
        self,
        directory: Path,
        peers: NodePeers,
        keep: int = 2,
        neighbour: bool = False,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        """Begin; nothing is read or written yet.

        Args:
            directory: The same path on all nodes. Emulated nodes may share a disk.
            peers: The ranks, and who shares a node.
            keep: Newest checkpoints that stay.
            neighbour: Copy each node's part to the next node, if there is another.
            max_file_bytes: Size at which shards are split.
        """
        self.directory = Path(directory)
        self.peers = peers
        self.keep = keep
        self.neighbour = neighbour and len(peers.nodes) > 1
        self.max_file_bytes = max_file_bytes
        self._home = self.directory / f"node{peers.node}"
        self._leads = peers.rank == peers.node_ranks[0]
        self._whole: dict[int, Whole] = {}

    def save(self, step: int, fragments: Iterable[Fragment], **content: Unpack[Content]) -> SaveReport:
        """Write step ``step``, replacing one that exists, and remove what is older than the newest ``keep``.

        Arguments as for ``CheckpointStore.save``; ``extra_files`` go into the part of rank 0's node. CheckpointError on
        every rank when any rank fails; earlier checkpoints stay as they were and nothing is left behind. A copy on a
        neighbour that fails, or an old checkpoint that cannot be removed, is told in the report's ``problems``.
        """
        began = time.monotonic()
        action = f"saving step {step} to {self.directory} failed"
        final, temporary, save = self._home / f"global_step{step}", self._home / f"global_step{step}.tmp", None

        def write() -> dict[str, FileEntry]:
            return write_share(temporary, self.peers.rank, fragments, content["rank_state"], self.max_file_bytes)

        self._whole = {}
        try:
            known, save, papers = self._begin(action, step, documents(content))
            on_leaders(self.peers, action, lambda: self._prepare(temporary, known))
            shares = self.peers.gather_objects(agree(self.peers, action, write))
            extras = (papers, content.get("extra_files"))
            manifests = on_leaders(self.peers, action, lambda: self._complete(temporary, save, shares, *extras))
            self._check_pieces(action, temporary, manifests)
            on_leaders(self.peers, action, lambda: _publish(temporary, final))
        except CheckpointError as error:
            if self._leads:
                with suppress(OSError):
                    _withdraw(temporary, final, save)
            raise CheckpointError(f"{error}; earlier checkpoints are untouched") from error
        problems = self._copy(final, shares, manifests) if self.neighbour else []
        problems += self._retire(current([*known, save])[: self.keep])
        size = sum(len(m.encode()) + sum(entry.size for entry in m.files.values()) for m in manifests)
        return SaveReport(time.monotonic() - began, size, final, tuple(problems))

    def steps(self) -> tuple[list[int], list[str]]:
        """The steps, newest first, that are whole on the nodes' disks, and a line for everything that was passed over.

        Every file of every part is hashed, shared over the ranks of its node; a damaged part is replaced by its copy.
        Parts are taken for what their manifests say, whatever nodes and ranks there were when they were written. Steps
        that a later save of an earlier step has made obsolete are passed over. The same on every rank.
        """
        listed = on_leaders(self.peers, f"cannot list {self.directory}", lambda: list_parts(self.directory))
        intact, lines = [], []
        for node, (parts, problems) in enumerate(self._verified(listed)):
            lines += [f"{self.directory / place} on node {node}: {problem}" for place, problem in problems.items()]
            intact += [(node, part) for part in parts if part.place not in problems]
        self._whole, obsolete = assemble(intact)
        return list(self._whole), lines + obsolete

    @contextmanager
    def open(self, step: int, files_needed: Callable[[Checkpoint], set[str]]) -> Iterator[Checkpoint]:
        """A checkpoint that is whole according to ``steps``, readable on this node while the ``with`` statement lasts.

        ``files_needed`` is called once, with a checkpoint of which the headers are known but no file is there yet; it
        returns the names of the files this rank will read (``Checkpoint.overlapping`` helps); names that are not in
        the checkpoint do not count, and its documents always come along. Each node receives once what any of its
        ranks needs and its own disk has not. CheckpointError on every rank when any rank fails, or for another step.
        """
        action, view = f"cannot use step {step} of {self.directory}", self._home / "opened.tmp"
        if step not in self._whole:
            raise CheckpointError(f"{action}: it is not known to be whole on the nodes' disks")
        whole = self._whole[step]
        try:
            checkpoint = self._described(action, view, whole)
            needs = self._needs(action, checkpoint, files_needed)
            on_leaders(self.peers, action, lambda: self._link(view, whole))
            holders = {name: {node for node, _ in places} for name, places in whole.places.items()}
            transfers = fetches(self.peers.nodes, holders, needs, whole.manifest.files)
            agree(self.peers, action, lambda: carry_out(self.peers, transfers, view, view))
            yield checkpoint
            self.peers.gather_objects(None)  # the others of this node read from the same files
        finally:
            if self._leads:
                with suppress(OSError):  # the next save removes what stays
                    remove(view)

    # --- saving ------------------------------------------------------------------------------------------------------

    def _begin(self, action: str, step: int, documents: dict[str, bytes]) -> tuple[list[Save], Save, dict[str, bytes]]:
        """The saves that are there, the identity of a new one, and rank 0's documents: the same on all ranks."""

        def survey() -> list[tuple[Save, int]]:
            return [(part.save, part.node) for part in list_parts(self.directory)[0]]

        held = list(chain.from_iterable(on_leaders(self.peers, action, survey)))
        sequence = 1 + max((save.sequence for save, _ in held), default=0)
        identity, documents = on_rank_0(self.peers, action, lambda: (secrets.token_hex(16), documents))
        save = Save(sequence, identity, step, self.peers.world_size, len(self.peers.nodes))
        return current(complete_saves(held)), save, documents

    def _prepare(self, temporary: Path, known: list[Save]) -> None:
        """Tidy up after an interrupted save, which may have set a step aside and replaced it on some nodes only."""
        self._home.mkdir(parents=True, exist_ok=True)
        for folder in (self._home, self._home / NEIGHBOUR):
            for leftover in folder.glob("*.tmp"):
                remove(leftover)
            for aside in folder.glob("global_step*.old"):
                final = aside.with_suffix("")
                if not final.exists():
                    aside.rename(final)
                elif _save_of(aside) in known:
                    discard(final)
                    aside.rename(final)
                else:
                    discard(aside)
        temporary.mkdir()

    def _complete(
        self,
        temporary: Path,
        save: Save,
        shares: list[dict[str, FileEntry]],
        documents: dict[str, bytes],
        extra_files: dict[str, Path] | None,
    ) -> Manifest:
        """Add to the files of this node's ranks what makes them a part."""
        files = {name: entry for rank in self.peers.node_ranks for name, entry in shares[rank].items()}
        extra_files = extra_files if self.peers.rank == 0 else None
        files |= write_extras(temporary, documents, extra_files, taken=set().union(*shares))
        part = NodePart(save=save.identity, sequence=save.sequence, node=self.peers.node, nodes=save.nodes)
        manifest = Manifest(step=save.step, world_size=save.world_size, files=files, part=part)
        complete(temporary, manifest)
        return manifest

    def _check_pieces(self, action: str, temporary: Path, manifests: list[Manifest]) -> None:
        """Raise CheckpointError unless the parts together have every element of every tensor."""
        own = sorted(manifests[self.peers.node].files)[self._number :: len(self.peers.node_ranks)]
        part = Checkpoint(temporary, manifests[self.peers.node])
        described = self.peers.gather_objects(agree(self.peers, action, lambda: part.describe(own)))
        whole = Checkpoint(self.directory, merged(manifests), list(chain.from_iterable(described)))
        on_rank_0(self.peers, action, whole.check_pieces)

    def _copy(self, final: Path, shares: list[dict[str, FileEntry]], manifests: list[Manifest]) -> list[str]:
        """Send this node's part to the next node and receive the one before; what went wrong, on every rank."""
        peers, action = self.peers, f"copying {final.name} to the neighbours failed"
        copy = self._home / NEIGHBOUR / final.name
        arriving = copy.with_name(f"{copy.name}.tmp")
        by_rank = [dict(share) for share in shares]
        for manifest, ranks in zip(manifests, peers.nodes):
            written = set().union(*(shares[rank] for rank in ranks))
            by_rank[ranks[0]] |= {name: entry for name, entry in manifest.files.items() if name not in written}
        transfers = copies(peers.nodes, by_rank)

        def finish() -> None:
            complete(arriving, manifests[peers.node - 1])
            _publish(arriving, copy)

        try:
            on_leaders(peers, action, lambda: arriving.mkdir(parents=True))
            agree(peers, action, lambda: carry_out(peers, transfers, final, arriving))
            on_leaders(peers, action, finish)
        except CheckpointError as error:
            if self._leads:
                with suppress(OSError):
                    remove(arriving)
            return [str(error)]
        return []

    def _retire(self, kept: list[Save]) -> list[str]:
        """Remove from this disk what belongs to other saves; what went wrong, on every rank.

        Folders of nodes that are no longer are cleared, too. On a disk that several nodes share each finds the same.
        """
        names = {f"global_step{save.step}" for save in kept}

        def clear() -> None:
            parts, unreadable = list_parts(self.directory)
            surplus = [part.place for part in parts if part.save not in kept]
            # A manifest may be unreadable for a moment only, so the names that are kept count as well.
            surplus += [place for place in unreadable if Path(place).name not in names]
            for place in surplus:
                with suppress(FileNotFoundError):  # another node on this disk was faster
                    discard(self.directory / place)

        try:
            on_leaders(self.peers, f"removing old checkpoints in {self.directory} failed", clear)
        except CheckpointError as error:
            return [str(error)]
        return []

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def _number(self) -> int:
        """Which of its node's ranks this is."""
        return self.peers.node_ranks.index(self.peers.rank)

    def _verified(self, listed: list[tuple[list[Part], dict[str, str]]]) -> list[tuple[list[Part], dict[str, str]]]:
        """The same with the problems of every part's files: of each node, from all its ranks."""
        own = listed[self.peers.node][0]

        def check() -> dict[str, list[str]]:
            files = [(part.place, name) for part in own for name in sorted(part.manifest.files)]
            share, problems = defaultdict(list), {}
            for place, name in files[self._number :: len(self.peers.node_ranks)]:
                share[place].append(name)
            for part in own:
                path, manifest = self.directory / part.place, part.manifest
                lines = manifest.problems(path, share[part.place], hashes=True, progress=self._leads)
                lines += manifest.strangers(path) if self._leads else []
                if lines:
                    problems[part.place] = lines
            return problems

        found = self.peers.gather_objects(agree(self.peers, f"cannot verify {self.directory}", check))
        verified = []
        for ranks, (parts, problems) in zip(self.peers.nodes, listed):
            lines = defaultdict(list)
            for place, its_lines in chain.from_iterable(found[rank].items() for rank in ranks):
                lines[place] += its_lines
            verified.append((parts, problems | {place: summary(its_lines) for place, its_lines in lines.items()}))
        return verified

    def _described(self, action: str, path: Path, whole: Whole) -> Checkpoint:
        """The checkpoint at ``path``, its headers read by ranks that have them."""

        def describe() -> list:
            found = []
            for number, (name, places) in enumerate(sorted(whole.places.items())):
                node, place = places[0]
                ranks = self.peers.nodes[node]
                if ranks[number % len(ranks)] == self.peers.rank:
                    found += Checkpoint(self.directory / place, whole.manifest).describe([name])
            return found

        described = chain.from_iterable(self.peers.gather_objects(agree(self.peers, action, describe)))
        checkpoint = Checkpoint(path, whole.manifest, sorted(described, key=lambda stored: stored.file))
        on_rank_0(self.peers, action, checkpoint.check_pieces)
        return checkpoint

    def _needs(
        self, action: str, checkpoint: Checkpoint, files_needed: Callable[[Checkpoint], set[str]]
    ) -> list[set[str]]:
        """The files that each node needs."""
        needed = self.peers.gather_objects(agree(self.peers, action, lambda: files_needed(checkpoint)))
        there = set(checkpoint.manifest.files)
        return [{TRAINER, CONFIG}.union(*(needed[rank] for rank in ranks)) & there for ranks in self.peers.nodes]

    def _link(self, view: Path, whole: Whole) -> None:
        """Make a directory that shows all files of a checkpoint which this disk has."""
        remove(view)
        view.mkdir(parents=True)
        for name, places in whole.places.items():
            own = [place for node, place in places if node == self.peers.node]
            if own:
                (view / name).parent.mkdir(parents=True, exist_ok=True)
                (view / name).symlink_to((self.directory / own[0] / name).absolute())


def _publish(temporary: Path, final: Path) -> None:
    """Give a finished part its name; one that has it is set aside, since not all nodes may come so far."""
    if final.exists():
        final.rename(final.with_name(f"{final.name}.old"))
    temporary.rename(final)
    sync_directory(final.parent)


def _withdraw(temporary: Path, final: Path, save: Save | None) -> None:
    """Leave nothing of a save that failed on some node, whether or not this one had published it."""
    remove(temporary)
    aside = final.with_name(f"{final.name}.old")
    if save is not None and _save_of(final) == save:
        discard(final)
    if aside.exists() and not final.exists():
        aside.rename(final)


def _save_of(path: Path) -> Save | None:
    """The save that a directory belongs to; None when it is no part."""
    try:
        return Part.read(path.parent, path.name).save
    except CheckpointError:
        return None
