"""The trainer ranks of one model as a grid, and the device meshes that its parts are spread over.

Called by engine/fsdp_engine.py; read by parallelize.py and what it calls.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from arealite.api.errors import ConfigError
from arealite.api.types import Dims
from arealite.engine.parallel import group_limit


class RankMesh:
    """Ranks in the order pipeline stage, data, context, tensor (slowest first); all of them make one.

    What is spread over which mesh:
    - a layer's own weights: over `tensor` by heads and columns, then by FSDP over `shards`;
    - what works on single tokens (embedding, head, norms outside of the layers): by FSDP over `stage`, all ranks of a
      pipeline stage, since each of them has other tokens;
    - experts: over `expert`, then by FSDP over `expert_shards`.
    Each rank computes the tokens of its place (context, tensor) of its data share: `token_place` of `num_token_places`.
    """

    def __init__(self, dims: Dims, device: torch.device, timeout_s: float) -> None:
        """`timeout_s`: the longest wait in any of the meshes' groups."""
        world_size = dist.get_world_size()
        if dims.p * dims.d * dims.c * dims.t != world_size:
            raise ConfigError(
                f"the trainer's layout {dims} has {dims.p * dims.d * dims.c * dims.t} ranks and {world_size} were"
                " started: give allocation_mode and the number of processes the same product d x t x c x p"
            )
        self.dims, self.device, self._limit = dims, device, group_limit(device, timeout_s)
        rank = dist.get_rank()
        self.tensor_rank = rank % dims.t
        self.context_rank = rank // dims.t % dims.c
        self.share = rank // (dims.t * dims.c) % dims.d
        self.stage_rank = rank // (dims.t * dims.c * dims.d)
        self.token_place = rank % (dims.c * dims.t)
        self.num_token_places = dims.c * dims.t
        self._layers = self._grid(p=dims.p, dc=dims.d * dims.c, t=dims.t)

    def _grid(self, **sizes: int) -> DeviceMesh:
        """All ranks as a mesh with these dimensions, slowest first. Collective."""
        ranks = torch.arange(dist.get_world_size()).view(*sizes.values())
        mesh = DeviceMesh(self.device.type, ranks, mesh_dim_names=tuple(sizes))
        for group in mesh.get_all_groups():  # a DeviceMesh takes no limit: its groups would wait for half an hour
            _set_pg_timeout(self._limit, group)
        return mesh

    @property
    def is_first_stage(self) -> bool:
        return self.stage_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage_rank == self.dims.p - 1

    @cached_property
    def tensor(self) -> DeviceMesh:
        return self._layers["t"]

    @cached_property
    def shards(self) -> DeviceMesh:
        return self._layers["dc"]

    @cached_property
    def pipeline(self) -> dist.ProcessGroup:
        """The ranks with this rank's place on all stages, by stage."""
        ranks = torch.arange(dist.get_world_size()).view(self.dims.p, -1).T.tolist()
        # Not the grid's: gloo takes the limit of messages from one rank to another when a group is made, and then only.
        group: dist.ProcessGroup
        group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=self._limit)
        return group

    @cached_property
    def context(self) -> DeviceMesh:
        dims = self.dims
        return self._grid(p=dims.p, d=dims.d, c=dims.c, t=dims.t)["c"]

    @cached_property
    def tokens(self) -> DeviceMesh:
        """The ranks that hold the other tokens of this rank's share, by `token_place`."""
        return self._grid(p=self.dims.p, d=self.dims.d, ct=self.num_token_places)["ct"]

    @cached_property
    def stage(self) -> DeviceMesh:
        """All ranks of this rank's pipeline stage."""
        dims = self.dims
        return self.shards if dims.t == 1 else self._grid(p=dims.p, all=dims.d * dims.c * dims.t)["all"]

    @cached_property
    def _experts(self) -> DeviceMesh:
        dims = self.dims
        return self._grid(p=dims.p, rest=dims.d * dims.c * dims.t // dims.e, e=dims.e)

    @cached_property
    def expert(self) -> DeviceMesh:
        return self._experts["e"]

    @cached_property
    def expert_shards(self) -> DeviceMesh:
        return self._experts["rest"]
