"""One weight update with several real servers: by every link, by broadcast with a server lost, and what is refused."""

import json
import os
import signal
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from support import forks
from support.rollout import quick_config
from transformers import AutoModelForCausalLM

from arealite.api.errors import ConfigError, WeightSyncError
from arealite.rollout.client import RemoteNativeEngine
from arealite.weights.link import WeightLink, verify

NUM_SERVERS = 2


def started(tiny_llama: str) -> AbstractContextManager[list[tuple[Any, str]]]:
    return forks.servers(NUM_SERVERS, tiny_llama, "--context-length", "256", "--max-running-requests", "4")


@pytest.fixture(scope="module")
def servers(tiny_llama):
    with started(tiny_llama) as found:
        yield found


@contextmanager
def connected(servers: list[tuple[Any, str]]) -> Iterator[RemoteNativeEngine]:
    engine = RemoteNativeEngine(quick_config())
    engine.initialize(addresses=[address for _, address in servers])
    yield engine
    engine.destroy()


@pytest.fixture
def engine(servers):
    with connected(servers) as engine:
        yield engine


def ask(address: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(f"http://{address}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def held(address: str, names: Iterable[str]) -> tuple[str, dict[str, int]]:
    """A server's version and the checksums of its live tensors, which an update of nothing tells."""
    version = json.loads(urllib.request.urlopen(f"http://{address}/model_info", timeout=60).read())["weight_version"]
    ask(address, "/begin_weight_update", {})
    return version, ask(address, "/end_weight_update", {"checksum_names": sorted(names)})["checksums"]


def versions_of_weights(path: str) -> Iterator[list[tuple[str, torch.Tensor]]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    while True:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        yield [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]


def test_buckets_reach_all_servers(servers, engine, tiny_llama, tmp_path, monkeypatch):
    link, weights = WeightLink("distributed", tmp_path, bucket_bytes=100_000), versions_of_weights(tiny_llama)
    previous = None
    for version in (1, 2):
        meta = link.publish(next(weights), version)
        assert len(meta.buckets) > 2
        receipts = engine.update_weights(meta, link)
        assert receipts.keys() == {"server-0", "server-1"}
        verify(meta, receipts, previous, must_differ=True)
        previous = meta
        states = [held(address, meta.checksums) for _, address in servers]
        assert states[0] == states[1] and states[0][0] == str(version)
        assert all(states[0][1][name] == value for name, value in meta.checksums.items())
    link.close()


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_server_lost_in_a_broadcast_costs_the_others_nothing_but_time(way, tiny_llama, tmp_path, monkeypatch):
    """The broadcast fails for all; it is made again, in a new group, for those that are left."""
    monkeypatch.setattr(plain := "arealite.weights.wire.broadcast", limited(plain))
    link, weights = WeightLink("distributed", tmp_path, bucket_bytes=100_000), versions_of_weights(tiny_llama)
    with started(tiny_llama) as servers, connected(servers) as engine:
        engine.update_weights(link.publish(next(weights), 1), link)
        victim, sending = servers[1][0], link.send

        def lose(bucket: int) -> None:
            if bucket == 1 and victim.is_alive():
                os.kill(victim.pid, way)
            return sending(bucket)

        monkeypatch.setattr(link, "send", lose)
        meta = link.publish(next(weights), 2)
        receipts = engine.update_weights(meta, link)
        assert receipts.keys() == {"server-0"}
        verify(meta, receipts)
        assert held(servers[0][1], ())[0] == "2"
        monkeypatch.setattr(link, "send", sending)
        meta = link.publish(next(weights), 3)
        assert engine.update_weights(meta, link).keys() == {"server-0"}
    link.close()


def limited(name: str):
    from arealite.weights import wire

    plain = wire.broadcast
    return lambda *args, **more: plain(*args, **{**more, "limit_s": 3.0})


@pytest.mark.parametrize("fault", ["name", "shape"])
def test_a_refused_bucket_leaves_version_and_weights(fault, servers, engine, tiny_llama, tmp_path):
    link, weights = WeightLink("distributed", tmp_path, bucket_bytes=100_000), versions_of_weights(tiny_llama)
    meta = link.publish(next(weights), 1)
    engine.update_weights(meta, link)
    before = [held(address, meta.checksums) for _, address in servers]
    tensors = next(weights)
    name, tensor = tensors[3]
    tensors[3] = ("model.nowhere.weight", tensor) if fault == "name" else (name, tensor[:-1])
    with pytest.raises(WeightSyncError, match="model.nowhere.weight" if fault == "name" else name):
        engine.update_weights(link.publish(tensors, 2), link)
    assert [held(address, meta.checksums) for _, address in servers] == before
    link.close()


def test_what_cannot_be_sent_is_said(engine, tiny_llama, tmp_path):
    link = WeightLink("distributed", tmp_path)
    meta = link.publish(next(versions_of_weights(tiny_llama)), 1)
    with pytest.raises(ConfigError, match="with the weight link"):
        engine.update_weights(meta)
    link.close()
