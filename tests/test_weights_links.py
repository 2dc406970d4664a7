"""Weight links: what the trainer publishes is what another process reads; what is wrong is named."""

import resource
import signal
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from arealite.api.cli_args import GenerationHyperparameters
from arealite.api.errors import WeightSyncError
from arealite.api.run_args import StatsLoggerConfig
from arealite.api.types import Batch, Completion, Group, Task, Trajectory, WeightUpdateMeta
from arealite.weights.handshake import MismatchGuard
from arealite.weights.link import WeightLink, verify
from arealite.weights.wire import checksum, cut, iterate_tensors


def make_tensors(seed: int = 0, num_tensors: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.weight": torch.randn(7 + i, 5, generator=generator) for i in range(num_tensors)}
    tensors["half"] = torch.randn(33, generator=generator).to(torch.bfloat16)
    tensors["scalar"] = torch.tensor(3.0)
    tensors["empty"] = torch.empty(0, 4)
    return tensors


@pytest.mark.parametrize("kind", ["shm", "disk"])
def test_every_version_arrives_whole_and_grown(kind, tmp_path):
    link = WeightLink(kind, tmp_path / "weights")
    for version, count in enumerate((2, 40, 9)):
        sent = make_tensors(version, count)
        meta = link.publish(sent.items(), version)
        received = {name: tensor.clone() for name, tensor in iterate_tensors(meta)}
        assert received.keys() == sent.keys()
        for name, tensor in sent.items():
            assert received[name].dtype == tensor.dtype and received[name].shape == tensor.shape
            assert torch.equal(received[name], tensor), name
        assert meta.checksums and all(checksum(received[name]) == value for name, value in meta.checksums.items())
    link.close()


def test_shared_memory_is_read_by_another_process(tmp_path):
    link = WeightLink("shm", tmp_path)
    sent = make_tensors(3)
    meta = link.publish(sent.items(), 3)
    program = (
        "import sys, json; from arealite.api.types import *; from arealite.weights.wire import iterate_tensors;"
        "from arealite.weights.wire import checksum;"
        "meta = WeightUpdateMeta('shm', 3, sys.argv[1], tuple(TensorSlot(**s) for s in json.loads(sys.argv[2])));"
        "print(json.dumps({n: checksum(t) for n, t in iterate_tensors(meta)}))"
    )
    import json
    from dataclasses import asdict

    out = subprocess.run(
        [sys.executable, "-c", program, meta.path, json.dumps([asdict(s) for s in meta.slots])],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert json.loads(out.stdout) == {name: checksum(tensor) for name, tensor in sent.items()}
    link.close()


def test_buckets_hold_one_dtype_and_stay_within_their_size(tmp_path):
    sent = {f"a{i}": torch.randn(50 + i) for i in range(9)}
    sent |= {f"b{i}": torch.randn(33).bfloat16() for i in range(9)}
    sent["large"], sent["empty"] = torch.randn(5000), torch.empty(0, 3)
    link = WeightLink("distributed", tmp_path, bucket_bytes=1000)
    for number in range(2):  # the memory is used again
        meta = link.publish(sent.items(), number)
        assert meta.buckets[-1][1] == len(meta.slots) == len(sent)
        received = {}
        for index, (start, end) in enumerate(meta.buckets):
            slots, flat = meta.slots[start:end], link._buckets.bytes_of(index)
            assert len({slot.dtype for slot in slots}) == 1
            assert len(flat) == sum(slot.nbytes for slot in slots) and (len(flat) <= 1000 or len(slots) == 1)
            received |= {slot.name: cut(flat, slot).clone() for slot in slots}
        assert received.keys() == sent.keys() and all(torch.equal(received[name], sent[name]) for name in sent)


def test_only_the_writer_keeps_tensors_but_every_rank_iterates(tmp_path):
    link = WeightLink("disk", tmp_path)
    produced = []

    def stream():
        for name, tensor in make_tensors().items():
            produced.append(name)
            yield name, tensor

    assert link.publish(stream(), 0, writer=False) is None
    assert len(produced) == 43 and not list(tmp_path.iterdir())


def test_disk_keeps_two_versions_and_no_partial_folder(tmp_path):
    link = WeightLink("disk", tmp_path)
    for version in range(4):
        link.publish(make_tensors(version, 3).items(), version)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v00000002", "v00000003"]


def test_a_full_disk_is_explained(tmp_path):
    """safetensors raises an error of its own there, which is no OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(WeightSyncError, match="cannot write weights of version 4 by disk.*free room"):
            WeightLink("disk", tmp_path).publish(make_tensors().items(), 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_missing_and_truncated_weights_are_explained(tmp_path):
    with pytest.raises(WeightSyncError, match="one\n? ?host"):
        list(iterate_tensors(WeightUpdateMeta("shm", 1, str(tmp_path / "absent"))))
    with pytest.raises(WeightSyncError, match="no .*safetensors"):
        list(iterate_tensors(WeightUpdateMeta("disk", 1, str(tmp_path))))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00")
    with pytest.raises(WeightSyncError, match="not a whole safetensors"):
        list(iterate_tensors(WeightUpdateMeta("disk", 1, str(tmp_path))))


def test_checksum_is_of_the_bytes_in_row_major_order_and_sees_single_bits():
    base = torch.arange(1000, dtype=torch.float32)
    swapped = base.clone()
    swapped[[1, 2]] = swapped[[2, 1]]
    assert len({checksum(base), checksum(swapped), checksum(base + 1e-7 * (base == 1))}) == 3
    turned, half = base.reshape(10, 100).t(), base[7].to(torch.bfloat16)
    assert checksum(turned) == zlib.crc32(turned.numpy().tobytes("C"))
    assert checksum(half) == zlib.crc32(half.view(torch.uint16).numpy().tobytes())


def test_handshake_names_what_is_wrong(tmp_path):
    link = WeightLink("disk", tmp_path)
    first = link.publish(make_tensors(0).items(), 1)
    second = link.publish(make_tensors(1).items(), 2)
    verify(second, {"server-0": dict(second.checksums)}, first, must_differ=True)
    broken = dict(second.checksums)
    victim = sorted(broken)[1]
    broken[victim] ^= 1
    with pytest.raises(WeightSyncError, match=rf"server-1 holds other weights.*{victim}"):
        verify(second, {"server-0": dict(second.checksums), "server-1": broken}, first)
    with pytest.raises(WeightSyncError, match=f"without confirming {victim}"):
        verify(second, {"s": {n: c for n, c in second.checksums.items() if n != victim}})
    name = "layers.16.weight"  # one that is confirmed at every version
    partly = link.publish((make_tensors(0) | {name: make_tensors(1)[name]}).items(), 2)
    verify(partly, {"s": dict(partly.checksums)}, first, must_differ=True)
    again = link.publish(make_tensors(0).items(), 2)
    with pytest.raises(WeightSyncError, match="changed nothing"):
        verify(again, {"s": dict(again.checksums)}, first, must_differ=True)
    verify(again, {"s": dict(again.checksums)}, first, must_differ=False)


class Actor:
    """A trainer of one rank whose logprobs are known."""

    class collective:
        rank, num_shares = 0, 1

        @staticmethod
        def scatter(shares):
            return shares[0]

        @staticmethod
        def on_head(work):
            return work()

    def __init__(self, at_one: float, at_sampling: float) -> None:
        self.at_one, self.at_sampling = at_one, at_sampling

    def compute_logp(self, batch, temperature=None):
        return np.where(batch.loss_mask, self.at_one if temperature == 1.0 else self.at_sampling, 0.0)


class Servers:
    @staticmethod
    def score(rows):
        return [[-1.0] * len(row) for row in rows]

    @staticmethod
    def get_version():
        return 3


def make_batch(num_sequences: int = 6) -> Batch:
    rows = [
        Trajectory("t", i, [5, 6, 7], [False, True, True], [0.0, -2.0, -9.0], [-1, 3, 2], 1.0, "stop")
        for i in range(num_sequences)
    ]
    return Batch.pack([Group(Task("t"), 0, rows)])


class Sampling(Servers):
    """Answers with two tokens of the current version, and no more."""

    def __init__(self):
        self.requests = []

    def sample(self, requests):
        self.requests += requests
        return [Completion([8, 9], [-2.0, -3.0], [3, 3], "stop") for _ in requests]


def test_guard_looks_where_fresh_tokens_are_and_samples_some_where_there_are_none():
    """Where the servers run ahead, the groups of a step hold tokens of older weights only."""
    guard = MismatchGuard(StatsLoggerConfig(probe_every_steps=1), GenerationHyperparameters(temperature=0.7))
    old = replace(batch := make_batch(), versions=np.where(batch.loss_mask, 2, -1))
    late = replace(old, versions=old.versions.copy())
    late.versions[-1] = 3  # the last token of the last of six sequences
    servers = Sampling()
    assert guard.check(0, late, Actor(-1.0, -9.5), servers) == pytest.approx(
        {"num_mismatch_sampled": 1, "mismatch_mean": 0.5 / 9, "mismatch_max": 0.5}
    )
    assert not servers.requests
    found = guard.check(0, old, Actor(-1.0, -2.5), servers)
    assert found == pytest.approx({"num_mismatch_sampled": 8, "mismatch_mean": 0.25, "mismatch_max": 0.5})
    assert [(r.input_ids, r.temperature) for r in servers.requests] == [([5], 0.7)] * 4


def test_a_restriction_of_sampling_is_said_at_the_start(caplog):
    MismatchGuard(StatsLoggerConfig(), GenerationHyperparameters())
    assert not caplog.records
    MismatchGuard(StatsLoggerConfig(), GenerationHyperparameters(top_k=20, min_p=0.02))
    assert "gconfig.top_k, gconfig.min_p restricts what is sampled" in caplog.text


def test_guard_compares_scored_tokens_and_those_sampled_by_this_version(caplog):
    sampling = GenerationHyperparameters()
    guard = MismatchGuard(StatsLoggerConfig(probe_every_steps=2, mismatch_warn=0.25, mismatch_stop=0.5), sampling)
    # Two scored tokens off by 0.1, one freshly sampled token off by 0.4; the token of version 2 is not compared.
    found = guard.check(0, make_batch(), Actor(-1.1, -2.4), Servers())
    assert found["mismatch_mean"] == pytest.approx(0.2, abs=1e-6) and found["mismatch_max"] == pytest.approx(0.4)
    assert found["num_mismatch_sampled"] == 4  # sequences
    assert not caplog.records and guard.check(1, make_batch(), Actor(-1.1, -2.4), Servers()) == {}
    assert guard.check(2, make_batch(0), Actor(-1.1, -2.4), Servers()) == {"num_mismatch_sampled": 0}
    assert "step 2: of 0 sequences no token was compared as sampled" in caplog.text
    guard.check(2, make_batch(), Actor(-1.4, -2.1), Servers())
    assert "differ by 0.3000" in caplog.text
    # Where servers may not end an answer yet, they record logprobs of another distribution: not compared.
    forced = MismatchGuard(StatsLoggerConfig(probe_every_steps=2), GenerationHyperparameters(min_new_tokens=1))
    found = forced.check(2, make_batch(), Actor(-1.1, -2.4), Sampling())
    assert found["num_mismatch_sampled"] == 8 and found["mismatch_max"] == pytest.approx(0.6)  # of new answers
    assert guard.check(2, make_batch(), Actor(-1.0, -3.2), Servers())["mismatch_max"] == pytest.approx(1.2)  # one token
    with pytest.raises(WeightSyncError, match="mismatch_stop allows 0.5"):
        guard.check(2, make_batch(), Actor(-2.0, -2.0), Servers())
    with pytest.raises(WeightSyncError, match="NaN"):
        guard.check(2, make_batch(), Actor(float("nan"), -2.0), Servers())
