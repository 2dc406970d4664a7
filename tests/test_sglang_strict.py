"""RemoteSGLangEngine against a server that refuses what SGLang 0.5.23 refuses: see support/strict_sglang.py. SGLang
itself needs CUDA.
"""

import pytest
from support.rollout import MembersWorkflow, quick_config, serving
from test_rollout_native import check_versions, two_models

from arealite.api.errors import RequestError, WeightSyncError
from arealite.api.types import GenerationRequest, Task
from arealite.rollout.backends.sglang import SGLangBackend
from arealite.rollout.client import RemoteSGLangEngine
from arealite.weights.link import WeightLink


@pytest.fixture(scope="module")
def address(tiny_llama):
    with serving(tiny_llama, "--strict-sglang", context_length=512) as found:
        yield found


@pytest.fixture(scope="module")
def models(tiny_llama):
    return two_models(tiny_llama)


class OldSGLang(SGLangBackend):
    """Takes the server for an older one than it is."""

    def detect(self, facts, server_id):
        return SGLangBackend((0, 5, 20))


class OldSGLangEngine(RemoteSGLangEngine):
    backend = OldSGLang


@pytest.mark.parametrize(
    ("pause_mode", "kind"),
    [("retract", "distributed"), ("abort", "disk"), ("in_place", "distributed")],
)
def test_updates_reach_requests_in_flight(address, models, tmp_path, pause_mode, kind):
    config = quick_config(pause_mode=pause_mode, max_head_offpolicyness=8, consumer_batch_size=8)
    engine = RemoteSGLangEngine(config, ledger_path=tmp_path / "ledger.jsonl")
    engine.initialize(addresses=[address])
    link = WeightLink(kind, tmp_path)
    try:
        engine.update_weights(link.publish(models[0].named_parameters(), 0), link)
        for i in range(6):
            engine.submit(Task(f"e0-r{i}", prompt="x"), MembersWorkflow(num_members=3, max_new_tokens=150))
        for version in range(1, 5):
            engine.pause()
            meta = link.publish(models[version % 2].named_parameters(), version)
            assert engine.update_weights(meta, link) == {}  # SGLang confirms no single tensor
            engine.resume()
        groups = engine.wait(6, timeout_s=120)
        trajectories = [t for group in groups for t in group.trajectories]
        check_versions(engine, trajectories, engine.stats(), models, pause_mode)
    finally:
        engine.destroy()
        link.close()


def test_what_the_server_says_of_itself_is_understood(address):
    engine = RemoteSGLangEngine(quick_config())
    engine.initialize(addresses=[address])
    (server,) = engine._live.router.servers
    engine.destroy()
    assert server.backend.version == (0, 5, 23) and server.backend.num_ranks == 1


def test_the_server_is_as_strict_as_sglang(address, models, tmp_path):
    """The same calls without what a new SGLang wants fail: the tests above would notice. Leaves the server paused."""
    link = WeightLink("distributed", tmp_path)
    engine = OldSGLangEngine(quick_config(pause_mode="abort"))
    engine.initialize(addresses=[address])
    try:
        with pytest.raises(RequestError, match="400"):
            engine._live.run(engine.agenerate(GenerationRequest("r", [1], 8, top_p=2.0)), "test")
        with pytest.raises(WeightSyncError, match="session"):
            engine.update_weights(link.publish(models[0].named_parameters(), 9), link)
    finally:
        engine.destroy()
        link.close()
