"""A vLLM worker's end of a weight link: methods that vLLM mixes into its worker class.

Start vLLM with --worker-extension-cls arealite.weights.vllm_worker.WeightReceiver; rollout/backends/vllm.py calls the
methods by /collective_rpc. Runs under vLLM's interpreter, in the worker process, while generation is paused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from arealite.api.types import TensorSlot, WeightUpdateMeta
from arealite.weights.wire import broadcast, checksum, cut, iterate_tensors, join_group, leave_group


class WeightReceiver:
    """Mixed into vLLM's Worker, whose attributes it uses. One update is begin, any number of loads, end: vLLM then
    fuses and packs each layer as soon as all its parts are there, and copies it over the live one."""

    vllm_config: Any
    model_runner: Any
    device: torch.device
    rank: int

    def arealite_load(self, checksum_names: list[str], slots: list[dict[str, Any]], **record: Any) -> dict[str, Any]:
        """A whole update from disk or shared memory."""
        self.arealite_begin(checksum_names)
        self._arealite_add(iterate_tensors(WeightUpdateMeta(**record, slots=slots_of(slots))))
        return self.arealite_end()

    def arealite_join(
        self, address: str, port: int, rank_offset: int, world_size: int, name: str, backend: str
    ) -> None:
        """Join the trainer's process group; returns once all members have joined."""
        for old in self.__dict__.get("_arealite_groups", {}).values():
            leave_group(old)
        joined = join_group(address, port, rank_offset + self.rank, world_size, name, backend)
        self._arealite_groups: dict[str, Any] = {name: joined}

    def arealite_begin(self, checksum_names: list[str]) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._arealite_names = frozenset(checksum_names)
        self._arealite_checksums: dict[str, int] = {}
        self._arealite_loaded: set[str] = set()
        model = self.model_runner.get_model()
        named = [name.replace(".base_layer.", ".") for name, _ in model.named_parameters()]
        # A quantised model has parameters that no checkpoint names.
        self._arealite_wanted = set(named if self.vllm_config.model_config.quantization is None else [])
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)

    def arealite_receive(self, group: str, slots: list[dict[str, Any]]) -> None:
        """One bucket: a broadcast of the tensors' bytes, end to end, from the group's rank 0."""
        layout = slots_of(slots)
        # A new buffer each time: vLLM keeps what it was given until the layer is whole.
        flat = torch.empty(layout[-1].offset + layout[-1].nbytes, dtype=torch.uint8, device=self.device)
        broadcast(self._arealite_groups[group], [flat])
        self._arealite_add((slot.name, cut(flat, slot)) for slot in layout)

    def arealite_end(self) -> dict[str, Any]:
        """Puts the last layers in place. Returns the checksums that were asked for, of the tensors as they came, and
        the parameters for which nothing came."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model_runner.get_model(), self.vllm_config.model_config)
        self.model_runner.reset_lora_state()
        self.model_runner.reset_encoder_cache()
        self.model_runner.reset_mm_cache()
        return {"checksums": self._arealite_checksums, "absent": sorted(self._arealite_wanted - self._arealite_loaded)}

    def _arealite_add(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        from vllm.config import set_current_vllm_config

        def watched() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                if name in self._arealite_names:
                    self._arealite_checksums[name] = checksum(tensor)
                yield name, tensor

        with set_current_vllm_config(self.vllm_config):
            self._arealite_loaded |= self.model_runner.get_model().load_weights(watched()) or set()


def slots_of(records: list[dict[str, Any]]) -> tuple[TensorSlot, ...]:
    """The records as they came through JSON."""
    return tuple(TensorSlot(**{**record, "shape": tuple(record["shape"])}) for record in records)
