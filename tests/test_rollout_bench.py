"""`arealite bench serve`: lengths from every source, and a real server measured to the token."""

import json
import random
from itertools import islice

import pytest
import torch
from support.inference import LocalServer, save_tiny_llama, served

from arealite.api.errors import ConfigError
from arealite.rollout.bench import lengths, main, parse_arguments, workload


def take(spec, num=200, key="output_tokens"):
    return list(islice(lengths(spec, key, random.Random(0)), num))


def test_lengths(tmp_path):
    assert set(take("7")) == {7}
    assert set(take("3-6")) == {3, 4, 5, 6}
    listed = tmp_path / "lengths.jsonl"
    listed.write_text('{"prompt_tokens": 5, "output_tokens": 2}\n\n{"prompt_tokens": 6, "output_tokens": 9}\n')
    assert take(str(listed), 3) == [2, 9, 2]
    assert take(str(listed), 3, "prompt_tokens") == [5, 6, 5]


@pytest.mark.parametrize("spec", ["0", "6-3", "0-4", "nowhere.jsonl", "-5", "", "4-", "1.5"])
def test_lengths_refused(spec):
    with pytest.raises(ConfigError, match="output_tokens"):
        take(spec, 1)


@pytest.mark.parametrize("line", ["{}", '{"output_tokens": 0}', '{"output_tokens": true}', "[]", "nonsense"])
def test_bad_files_are_refused(tmp_path, line):
    listed = tmp_path / "lengths.jsonl"
    listed.write_text(line + "\n")
    with pytest.raises(ConfigError, match="output_tokens"):
        take(str(listed), 1)


def test_a_report_that_could_not_be_written_is_refused_before_it_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--address", "x", "--json", str(tmp_path / "nowhere" / "out.json")])
    assert "folder does not exist" in capsys.readouterr().err


def test_groups_share_their_prompt():
    args = parse_arguments(["--address", "x", "--group-size", "4", "--prompt-tokens", "3-9"])
    requests = workload(args, 10, seed=3)
    assert [r.group_id for r in requests[:4]] == [requests[0].group_id] * 4 != [requests[4].group_id] * 4
    assert requests[0].input_ids == requests[3].input_ids != requests[4].input_ids
    assert len({r.rid for r in requests}) == 10
    assert requests == workload(args, 10, seed=3)


def test_a_real_server_is_measured(tmp_path, capsys):
    model = served(save_tiny_llama(tmp_path / "model"), torch.float32)
    wanted = ["--concurrency", "3", "--num-requests", "7", "--prompt-tokens", "5", "--output-tokens", "4"]
    with LocalServer(model) as server:
        assert (
            main(["--address", server.url, *wanted, "--vocab-size", "250", "--json", str(tmp_path / "out.json")]) == 0
        )
        printed = capsys.readouterr().out
        found = json.loads(printed.splitlines()[-1])
        assert found == json.loads((tmp_path / "out.json").read_text())
        assert (found["num_requests"], found["num_prompt_tokens"], found["num_output_tokens"]) == (7, 35, 28)
        assert 0 < found["latency_s_p50"] <= found["latency_s_p99"] <= found["wall_s"]
        assert found["output_tokens_per_s"] == pytest.approx(28 / found["wall_s"], rel=1e-3)
        # A vocabulary beyond the server's: refused, counted, told, and the exit status says so.
        assert main(["--address", server.url, *wanted]) == 1
        assert "refused the request" in capsys.readouterr().out
