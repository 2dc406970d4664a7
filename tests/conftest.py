"""Fixtures that several test files share: a real small chat model, a tiny random one, a free port; and their order.

The environment is set before anything imports torch: processes that share cores must not spin, and no test may
reach for a model hub.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # which pytest-xdist sets: what tests start shall print as to a file

import socket
from pathlib import Path

import pytest

LONGEST = [f"test_{name}.py" for name in (
    "engine_layouts", "run_life", "run_nodes", "launcher_slurm", "run_recovery", "launcher_ray", "docs",
    "run_supervised", "recover_background", "vllm_server", "run_slurm", "launcher_nodes", "engine_resume",
    "server_chaos", "run_wirings", "run_roles", "run_stalls", "training_kernels", "prove",
)]  # fmt: skip


# Files whose tests take longer than a contributor's loop can wait, by what they need. All others are `fast`.
KINDS = {
    "process": """cli_refusals docs engine_layouts engine_loading engine_pipeline engine_ranks engine_resume
        engine_roles engine_roles_apart engine_weights evaluation_command inference_openai inference_process
        gateway_process launcher_local launcher_print prove_dry_run
        observe_watchdog prove recover_background recover_points reward_audit reward_code reward_judges reward_pool
        reward_sandbox rollout_updates run run_agents run_life run_lora
        run_online run_own_parts run_recovery run_roles run_stalls run_supervised run_wirings server_chaos vllm_server
        weights_group""",
    "model": """engine_actor engine_export engine_flops engine_lora engine_objective gpu_kernels gpu_server gpu_training
        evaluation_statistics inference_fuzz inference_gpu inference_lora inference_model inference_pause
        inference_prefix inference_sampler inference_scheduler inference_server inference_spans inference_streaming
        inference_updates kernels models_fidelity models_folders rollout_faults rollout_lora rollout_native
        rollout_staleness engine_samples sglang_strict training_kernels""",
    "cluster": "launcher_nodes launcher_ray launcher_slurm run_nodes run_slurm",
}
KIND_OF = {f"test_{stem}.py": kind for kind, stems in KINDS.items() for stem in stems.split()}


# Runs, kills and waits of half a minute and more: `make test-long`, which `make test` has no time for.
LONG = """
    test_a_step_keeps_to_the_dataflow_and_overlaps_what_it_may test_a_kill_of_a_role_costs_no_sample
    test_resumed_synchronous_run_equals_the_straight_one test_the_server_on_another_node_changes_no_step
    test_ranks_on_two_nodes_change_no_step_and_survive_the_loss_of_one test_servers_killed_and_frozen_under_load
    test_whatever_is_frozen_is_named test_killed_at_random_moments_a_complete_point_of_the_newest_finished_step_exists
    test_a_killed_evaluation_goes_on_and_ends_with_the_same_numbers test_a_run_with_both
    test_the_quickstart_makes_the_same_steps_on_ray_as_on_one_machine
    test_the_wall_limit_is_warned_of_and_the_job_goes_on_by_itself
    test_the_first_node_fails_and_an_agent_has_the_job_queued_again test_a_node_that_fails_ends_nothing_on_the_others
    test_ppo_with_a_critic_in_its_own_layout test_hostile_agents_meet_limits_and_others_are_not_affected
    test_a_session_of_300_turns_is_linear test_two_runs_on_the_same_nodes_do_not_touch_each_other
    test_a_node_that_is_lost_is_named_and_another_takes_its_place
    test_kills_of_all_that_agents_need_leave_an_exact_ledger_and_no_process
    test_a_reward_that_comes_after_a_kill_of_the_trainer_is_refused_and_the_ledger_is_exact
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test has the marker of its file's kind. The files that take longest come first, so that several workers end
    at about the same time."""
    for item in items:
        item.add_marker(KIND_OF.get(item.path.name, "fast"))
        if item.name.partition("[")[0] in LONG.split():
            item.add_marker("long")
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def smollm2():
    """Folder of SmolLM2-135M-Instruct (bf16); fetched into the cache when it is not there yet."""
    from arealite.models.fetch import fetch

    return str(fetch("smollm2-135m"))


@pytest.fixture(scope="session")
def tiny_llama(smollm2, tmp_path_factory):
    """Folder of a random fp32 Llama: 2 layers, hidden 64, 4 heads / 2 KV heads, SmolLM2's tokenizer. Always the same
    weights. They are wide enough (0.1) that the next-token distribution is far from uniform."""
    from support.runs import save_tiny_model

    return save_tiny_model(smollm2, tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two sets of weights of one tiny Llama over bytes; not to be changed."""
    from support.inference import save_tiny_llama

    return [save_tiny_llama(tmp_path_factory.mktemp(f"llama{seed}"), seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="session")
def folder(folders):
    """The first of them."""
    return folders[0]


@pytest.fixture
def server(folder):
    """The built-in server of it, in this process; not shared, so that weights and pauses may change."""
    from support.inference import LocalServer, served

    with LocalServer(served(folder)) as running:
        yield running


@pytest.fixture
def one_process():
    """The process group that a test makes ends with it."""
    import torch

    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def head(tmp_path):
    """head(collective, **config) -> a client on a fake server (its field `server`), with tmp_path/ledger.jsonl."""
    from support.rollout import FakeServer, RemoteNativeEngine, quick_config

    engines = []
    with FakeServer() as server:

        def connect(collective=None, limits=None, **changes):
            engine = RemoteNativeEngine(quick_config(**changes), 1, tmp_path / "ledger.jsonl", limits)
            engines.append(engine)
            engine.initialize(collective, addresses=[server.address])
            engine.server = server
            return engine

        yield connect
        for engine in engines:
            engine.destroy()


@pytest.fixture(scope="session")
def slurm_nodes(tmp_path_factory):
    """A real Slurm of three nodes on this machine."""
    from support.slurm import SlurmNodes, why_not

    if why := why_not():
        pytest.skip(why)
    with SlurmNodes(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def slurm(slurm_nodes, monkeypatch):
    """Its nodes are idle, its programs are those of this process, and nothing is left of its jobs afterwards."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_nodes.env[name])
    yield slurm_nodes
    slurm_nodes.revive()
    slurm_nodes.until(lambda: not slurm_nodes.processes(), "end of all processes of jobs", 30)


@pytest.fixture
def free_port():
    """A loopback port that was free a moment ago. Servers that can bind port 0 themselves should do that instead."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def repository():
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def lib(request):
    """The compiled kernels of an instruction set (support.kernels.each_kind), or those that this process uses."""
    from support.kernels import kernels_for

    return kernels_for(getattr(request, "param", None))
