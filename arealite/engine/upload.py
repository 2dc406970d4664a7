"""The trainer's end of a weight update: weights are published over a link, and every server's copy is verified.

Called by engine/fsdp_engine.py.
"""

from __future__ import annotations

from arealite.api.errors import WeightSyncError
from arealite.api.protocols import InferenceEngine
from arealite.api.types import WeightUpdateMeta
from arealite.engine.export import whole
from arealite.engine.sharded_model import ShardedModel
from arealite.weights.link import WeightLink, unchanged, verify
from arealite.weights.wire import checksum


class Upload:
    """Sends the weights of `sharded` to the servers of `rollout` over `link`, and remembers what they have, so that an
    update which changes nothing is noticed. `is_changed`: whether an update since then moved the weights."""

    def __init__(self, sharded: ShardedModel, rollout: InferenceEngine, link: WeightLink) -> None:
        self.sharded, self.rollout, self.link = sharded, rollout, link
        self.is_changed = False
        self._sent: WeightUpdateMeta | None = None

    def forget(self) -> None:
        """The weights are none that came from those sent last, as after a recovery."""
        self._sent, self.is_changed = None, False

    def send(self, version: int, meta: WeightUpdateMeta | None) -> int:
        """As FSDPEngine.upload_weights, the weights being `version`. Collective."""
        rollout, link, ranks = self.rollout, self.link, self.sharded.collective
        ranks.barrier("upload_weights")
        failure: WeightSyncError | None = None
        if meta is None:
            tensors = self.sharded.hub_tensors(link.device)
            ranks.on_head(rollout.prepare_update)
            try:
                meta = link.publish(tensors, version, writer=ranks.rank == 0, adapter=self.sharded.adapter)
            except WeightSyncError as error:
                failure = error
                for _ in tensors:  # the other ranks are gathering
                    pass

        must_differ = self.is_changed and not self._is_rounded_away(meta)

        def load() -> WeightUpdateMeta:
            if failure is not None:
                raise failure
            assert meta is not None
            verify(meta, rollout.update_weights(meta, link), self._sent, must_differ)
            return meta

        sent = self._sent = ranks.on_head(load)
        self.is_changed = False
        if ranks.rank != 0:
            rollout.set_version(sent.version)
        return sent.version

    def _is_rounded_away(self, meta: WeightUpdateMeta | None) -> bool:
        """Whether the weights that are checked of `meta` (given on rank 0) round to what was sent last. Collective."""
        sharded, previous = self.sharded, self._sent
        same = sharded.collective.broadcast(meta and previous and unchanged(meta, previous)) or {}
        own = [(p, same[n]) for name, p in sharded.parameters.items() if (n := sharded.file_name(name)) in same]
        found = [checksum(whole(p.detach().to(sharded.dtype))) == number for p, number in own]
        everywhere = [each for of_rank in sharded.collective.gather(found) for each in of_rank]
        return bool(everywhere) and all(everywhere)
