"""Loading a configuration: values arrive where they belong, and every mistake is named with its place and remedy."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from arealite.api import cli_args
from arealite.api.cli_args import GRPOConfig, SFTConfig, TrainEngineConfig
from arealite.api.config_keys import OURS, all_keys, explain, is_section, ours, walk
from arealite.api.errors import ConfigError
from arealite.api.load_config import load_config, load_config_file, to_yaml
from arealite.api.sections import setting

MINIMAL = "actor:\n  path: model\ntrain_dataset:\n  path: rows.jsonl\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def load(folder: Path, text: str = "", *overrides: str) -> GRPOConfig:
    return load_config_file(write(folder, MINIMAL + text), list(overrides), GRPOConfig)


def problems_of(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config_file(write(folder, text), list(overrides), GRPOConfig)
    first, *rest = str(raised.value).replace(str(folder) + "/", "").split("\n  ")
    assert first == f"{len(rest)} problem{'s' * (len(rest) != 1)} in the configuration:"
    return rest


def test_values_come_from_file_then_command_line(tmp_path):
    path = write(tmp_path, MINIMAL + "seed: 3\nserver: {args: {a: 1, b: 2}, context_length: 600}\nref: {path: base}\n")
    config = load_config(
        ["seed=4", "--config", str(path), "actor.optimizer.lr=1e-5", "server.args.b=3", "gconfig.stop=[a, b]"],
        GRPOConfig,
    )
    assert (config.seed, config.actor.path, config.actor.optimizer.lr) == (4, "model", 1e-5)
    assert config.server.args == {"a": 1, "b": 3}
    assert config.gconfig.stop == ["a", "b"]
    assert isinstance(config.ref, TrainEngineConfig)
    assert load_config([f"--config={path}", "ref=null"], GRPOConfig).ref is None


def test_text_is_taken_as_it_stands(tmp_path):
    config = load(tmp_path, "", "train_dataset.prompt_template=Q: {prompt} = ?", "trial_name=007", "actor.path='a b'")
    assert config.train_dataset.prompt_template == "Q: {prompt} = ?"
    assert (config.trial_name, config.actor.path) == ("007", "a b")


AS_WRITTEN = ["1.10", "2026_11_27", "12:30:45", "0123", "007", "1e-6", "0x1F", "0o7", "2026-11-27", "yes", "No", "on"]
AS_WRITTEN += ["OFF", "true", ".inf", "1_000", "-0", "=", "+5", "1."]


@pytest.mark.parametrize("word", AS_WRITTEN)
def test_text_needs_no_quotes_in_files_either(word, tmp_path):
    """What is meant as text, or as a word among others, arrives as it is written, from file and command line."""
    text = (
        f"trial_name: {word}\ngconfig: {{stop: [a, {word}]}}\nlauncher: {{env: {{{word}: {word}, A: '{word}'}}}}\n"
        f"server: {{args: {{quoted: '{word}'}}}}\n"
    )
    in_file = load(tmp_path, text)
    words = (f"trial_name={word}", f"gconfig.stop=[a, {word}]", f"server.args.quoted='{word}'")
    overridden = load(tmp_path, "", *words, f"launcher.env={{{word}: {word}}}", f"launcher.env.A={word}")
    assert overridden == in_file
    assert (in_file.trial_name, in_file.gconfig.stop) == (word, ["a", word])
    assert (in_file.launcher.env, in_file.server.args) == ({word: word, "A": word}, {"quoted": word})
    (tmp_path / "again.yaml").write_text(to_yaml(in_file))
    assert load_config_file(tmp_path / "again.yaml", [], GRPOConfig) == in_file


PATHS = [f"{section}.path" for section in ("actor", "ref", "critic", "train_dataset", "valid_dataset")]
PATHS += ["tokenizer_path", "cluster.fileroot"]


@pytest.mark.parametrize("key", PATHS)
def test_one_rule_for_every_path(key, tmp_path, monkeypatch):
    """~ and environment variables are filled in; what is relative stays so."""
    monkeypatch.setenv("HOME", "/home-of-somebody")
    monkeypatch.setenv("PLACE", "some place")
    section, _, name = key.rpartition(".")

    def found(path: str) -> str:
        config = load(tmp_path, "", f"{key}={path}")
        return vars(vars(config)[section] if section else config)[name]

    assert found("~/a") == "/home-of-somebody/a" and found("~") == "/home-of-somebody"
    assert found("$PLACE/b~c") == "some place/b~c" and found("sub/a$1") == "sub/a$1"
    assert found("${HOME}/${PLACE}") == "/home-of-somebody/some place"
    for path, complaint in (
        ("$ABSENT_/x", "variable ABSENT_, which is not set"),
        ("${ABSENT_}/x", "variable ABSENT_ is not set"),
        ("~nobody-at-all", "home of a user"),
        ("s3://bucket/x", "is an address"),
    ):
        with pytest.raises(ConfigError, match=f"command line: {re.escape(key)}.*: .*{complaint}"):
            found(path)


def test_every_path_field_is_marked_and_tested():
    marked = {f.name for c in vars(cli_args).values() if is_section(c) for f in fields(c) if f.metadata.get("is_path")}
    assert marked == {key.rpartition(".")[2] for key in PATHS}
    paths = {key for key in all_keys(GRPOConfig) if key.endswith(("path", "dir", "root", "file", "folder"))}
    assert paths == set(PATHS)


def test_numbers_and_switches_as_people_write_them(tmp_path):
    text = "seed: 0123\ntotal_train_steps: 1_000\nactor: {path: m, optimizer: {lr: 1e-6, max_grad_norm: .inf}}\n"
    text += "recover: {mode: off}\nevaluator: {at_start: no, at_end: On}\n"
    config = load_config_file(write(tmp_path, MINIMAL.replace("actor:\n  path: model\n", "") + text), [], GRPOConfig)
    assert (config.seed, config.total_train_steps, config.actor.optimizer.lr) == (123, 1000, 1e-6)
    assert (config.recover.mode, config.evaluator.at_start, config.evaluator.at_end) == ("off", False, True)
    args = "server: {args: {a: 3, b: 0123, c: 0.5, d: 1e-3, e: off, f: true, g: 12:30, h: ~, 08: 09}}\n"
    found = {"a": 3, "b": "0123", "c": 0.5, "d": 0.001, "e": "off", "f": True, "g": "12:30", "h": None, "08": "09"}
    assert load(tmp_path, args).server.args == found


def test_interpolation_and_yaml_anchors(tmp_path):
    text = "ref: {path: '${actor.path}'}\nvalid_dataset: {path: x}\n"
    config = load(tmp_path, text, "rollout.max_concurrent_rollouts=${train_dataset.batch_size}")
    assert config.ref is not None and config.ref.path == "model"
    assert load(tmp_path, text, "actor.max_tokens_per_mb=${ref.logprob_chunk_tokens}").actor.max_tokens_per_mb == 1024
    assert load(tmp_path, text, "actor.seed=${seed}${seed}").actor.seed == 11
    assert config.rollout.max_concurrent_rollouts == 16
    text = "gconfig: &g {max_new_tokens: 9, temperature: 0.7}\neval_gconfig: {<<: *g, temperature: 0.5}\n"
    found = load(tmp_path, text).eval_gconfig
    assert (found.max_new_tokens, found.temperature) == (9, 0.5)


def test_no_number_is_infinite_but_those_that_infinity_switches_off(tmp_path):
    floats = {key: f for key, _, f in walk(GRPOConfig(ref=TrainEngineConfig())) if "float" in str(f.type)}
    endless = [key for key, f in floats.items() if f.metadata.get("le") == math.inf]
    text = MINIMAL + "ref: {path: base}\n"
    load_config_file(write(tmp_path, text), [f"{key}=.inf" for key in endless], GRPOConfig)
    for word, keys in ((".inf", floats.keys() - endless), ("-.inf", floats), (".nan", floats)):
        found = problems_of(tmp_path, text, *(f"{key}={word}" for key in keys))
        assert {problem.partition(": ")[2].split()[0] for problem in found} >= set(keys), word
    assert len(floats) > 40 and endless == ["actor.optimizer.max_grad_norm", "actor.eps_clip_higher"] + endless[2:]


def test_held_out_tasks_are_asked_as_training_tasks_are(tmp_path):
    text = "gconfig: {max_new_tokens: 4096, stop: [END], top_k: 5, n_samples: 4}\nvalid_dataset: {path: v}\n"
    prompts = ["train_dataset.system_prompt=s", "train_dataset.prompt_template='{prompt}?'"]
    prompts.append("train_dataset.chat_template_kwargs.enable_thinking=false")
    config = load(tmp_path, text, *prompts)
    followed = dataclasses.replace(config.gconfig, n_samples=1, temperature=0.0)
    assert config.eval_gconfig == followed and config.eval_gconfig.stop is not config.gconfig.stop
    assert (config.valid_dataset.system_prompt, config.valid_dataset.prompt_template) == ("s", "{prompt}?")
    assert config.valid_dataset.chat_template_kwargs == {"enable_thinking": False}
    own = ["valid_dataset.chat_template_kwargs.x=1", "valid_dataset.system_prompt=null"]
    own += ["eval_gconfig.max_new_tokens=9", "eval_gconfig.stop=[]"]
    other = load(tmp_path, text, *prompts, *own)
    assert other.eval_gconfig == dataclasses.replace(followed, max_new_tokens=9, stop=[])
    assert (other.valid_dataset.system_prompt, other.valid_dataset.prompt_template) == (None, "{prompt}?")
    assert other.valid_dataset.chat_template_kwargs == {"x": 1}


def test_open_values_are_filled_in(tmp_path):
    config = load(tmp_path, "seed: 7\nref: {path: base}\ngconfig: {temperature: 0.7}\n", "train_dataset.batch_size=6")
    assert config.rollout.consumer_batch_size == 6
    assert config.rollout.max_concurrent_rollouts == 12
    assert (config.actor.temperature, config.ref.temperature) == (0.7, 0.7)
    assert (config.actor.seed, config.ref.seed) == (7, 7)
    others = load(tmp_path, "ref: {path: base}\n", "actor.dtype=float32")
    assert (others.ref.dtype, others.server.dtype) == ("float32", "float32")
    assert config.tokenizer_path == "model"
    assert load(tmp_path, "", "actor.seed=5").actor.seed == 5
    assert load(tmp_path, "allocation_mode: sglang:d1+fsdp:d1\n").weight_update == "distributed"
    assert load(tmp_path, "allocation_mode: sglang:d1+fsdp:d1\n", "weight_update=disk").weight_update == "disk"
    assert load(tmp_path, "allocation_mode: vllm:d1+fsdp:d1\n").weight_update == "shm"


def test_unknown_keys_name_file_line_and_nearest(tmp_path):
    text = MINIMAL + "actr: {path: x}\ngconfig:\n  temperatur: 1\noptimizer: {}\nzzz: 1\n"
    found = problems_of(tmp_path, text, "actor.lr=1", "rollout.etaa=1")
    assert found[0] == "run.yaml:5: unknown key 'actr': did you mean actor?"
    assert found[1].startswith("run.yaml:7: unknown key 'gconfig.temperatur': did you mean gconfig.temperature or")
    nearest = "actor.optimizer or ref.optimizer or critic.optimizer"
    assert found[2] == f"run.yaml:8: unknown key 'optimizer': did you mean {nearest}?"
    assert found[3].startswith("run.yaml:9: unknown key 'zzz': the top level has kind, experiment_name,")
    assert found[4].startswith("command line: unknown key 'actor.lr': did you mean ")
    assert "actor.optimizer.lr" in found[4]
    assert found[5].startswith("command line: unknown key 'rollout.etaa': rollout has max_head_offpolicyness,")
    assert len(found) == 6


ELSEWHERE = {  # what it is called here
    **dict.fromkeys(["group_size", "actor.group_size", "num_generations", "actor_rollout_ref.rollout.n"],
                    "gconfig.n_samples"),
    "actor.group_reward_norm": "actor.reward_norm.mean and actor.reward_norm.std",
    "actor.group_adv_norm": "actor.adv_norm.mean and",
    "backend": "allocation_mode, such as sglang:d4+fsdp:d4",
    "data.train_batch_size": "train_dataset.batch_size, in prompts",
    "sglang.mem_fraction_static": "server, and its own flags in server.args",
    "max_model_len": "server.context_length", "model_name": "actor.path", "gconfig.stop_strings": "gconfig.stop",
    "scheduler.type": "nothing: the command starts all processes", "stats_logger.wandb.mode": "stats_logger",
    "zzz.yyy": None,
}  # fmt: skip


@pytest.mark.parametrize("key", ELSEWHERE)
def test_names_of_other_systems_get_a_pointer(key, tmp_path):
    said = f"here it is {ELSEWHERE[key]}" if ELSEWHERE[key] else "the top level has kind, "
    nested = "".join(f"{'  ' * i}{word}:\n" for i, word in enumerate(key.split(".")))[:-1] + " 3\n"
    nested = nested.replace("actor:\n", "actor:\n  path: m\n")
    in_file = [line for line in problems_of(tmp_path, nested) if said in line]
    on_command_line = problems_of(tmp_path, MINIMAL, f"{key}=3")
    assert len(in_file) == 1 and said in on_command_line[0]


def test_pointers_lead_somewhere():
    for cls in (GRPOConfig, SFTConfig):
        keys = all_keys(cls)
        told = [text for name in OURS if (text := ours(name, keys))]
        assert not [key for text in told for key in re.findall(r"\b[a-z_]+[.][\w.]+\b", text) if key not in keys]
        assert len(told) > 30
    assert all(ours(name, all_keys(GRPOConfig)) for name in OURS)
    assert ours("learning_rate", keys) == "model.optimizer.lr" and ours("group_size", keys) == ""


WRONG = [
    ("seed: 1.5", "seed is 1.5, expected an integer"),
    ("seed: many", "seed is 'many', expected an integer"),
    ("seed: true", "seed is true, expected an integer"),
    ("seed: -1", "seed is -1, expected at least 0"),
    ("actor.seed: 1", "unknown key 'actor.seed': in a file each part stands on a line of its own"),
    ("seed: null", "seed is nothing (null), expected an integer"),
    ("trial_name: null", "trial_name is nothing (null), expected text, in quotes if the word itself is meant"),
    ("gconfig: {stop: [a, ~]}", "gconfig.stop.1 is nothing (null), expected text"),
    ("seed: 12:30", "seed is '12:30', expected an integer"),
    ("trial_name: [a]", "trial_name is ['a'], expected text"),
    ("evaluator: {at_start: 3}", "evaluator.at_start is 3, expected true or false"),
    ("evaluator: {at_start: maybe}", "evaluator.at_start is 'maybe', expected true or false"),
    ("gconfig: {top_p: high}", "gconfig.top_p is 'high', expected a number"),
    ("gconfig: {top_p: yes}", "gconfig.top_p is 'yes', expected a number"),
    ("gconfig: {stop: x}", "gconfig.stop is 'x', expected a list, each entry text"),
    ("gconfig: {stop_token_ids: [1, x]}", "gconfig.stop_token_ids.1 is 'x', expected an integer"),
    ("launcher: {env: {A: [1]}}", "launcher.env.A is [1], expected text"),
    ("gconfig: 3", "gconfig is 3, expected a mapping of n_samples, max_new_tokens,"),
    ("gconfig:", "gconfig is nothing (null), expected a mapping of n_samples,"),
    ("ref: model", "ref is 'model', expected a mapping of path,"),
    ("server: {args: 3}", "server.args is 3, expected a mapping"),
    ("seed: ${nowhere}", "seed is '${nowhere}': there is no key 'nowhere'; write \\${ for the text ${"),
    ("seed: ${ref.seed}", "seed is '${ref.seed}': there is no key 'ref.seed'"),
    ("seed: ${trial_name}", "seed is 'trial', expected an integer"),
    ("trial_name: ${trial_name}", "trial_name is '${trial_name}': trial_name leads back to itself"),
    ("weight_update: nccl", "weight_update is 'nccl', expected one of shm, disk, distributed"),
    ("recover: {num_kept: 0}", "recover.num_kept is 0, expected at least 1"),
    ("gconfig: {temperature: .nan}", "gconfig.temperature is not a number (nan), expected"),
    ("gconfig: {temperature: .inf}", "gconfig.temperature is inf, expected a finite number"),
]


@pytest.mark.parametrize(("text", "complaint"), WRONG)
def test_wrong_values_name_line_and_expectation(text, complaint, tmp_path):
    found = problems_of(tmp_path, MINIMAL + "\n" + text)
    assert len(found) == 1
    assert found[0].startswith(f"run.yaml:6: {complaint}")


def test_wrong_overrides(tmp_path):
    found = problems_of(tmp_path, MINIMAL, "seed", "a..b=1", "server.args.x=[", "seed=x", "=3")
    assert found[0] == "command line: 'seed' is not an override: write key=value"
    assert found[1] == "command line: 'a..b=1' is not an override: write key=value"
    assert found[2].startswith("command line: the value of server.args.x=[ is not YAML")
    assert found[3] == "command line: '=3' is not an override: write key=value"
    assert found[4] == "command line: seed is 'x', expected an integer"


def test_keys_below_a_value_are_unknown(tmp_path):
    found = problems_of(tmp_path, MINIMAL, "seed.x=1", "gconfig.stop.0=a", "zzz.qqq=1", "server.qqq.rrr=1")
    assert found[0] == "command line: unknown key 'seed.x': seed is an integer"
    assert found[1] == "command line: unknown key 'gconfig.stop.0': gconfig.stop is a list, each entry text"
    assert found[2].startswith("command line: unknown key 'zzz.qqq': the top level has kind, experiment")
    assert found[3].startswith("command line: unknown key 'server.qqq.rrr': server has dtype,")


def test_everything_wrong_is_reported_at_once(tmp_path):
    found = problems_of(tmp_path, "sed: 1\nseed: x\ngconfig: {n_samples: 1}\n")
    kinds = ["unknown key 'sed'", "an integer", "actor.path is missing", "train_dataset.path", "n_samples is 1"]
    assert all(kind in said for kind, said in zip(kinds, found, strict=True))


def test_unreadable_files(tmp_path):
    for text, complaint in (
        ("a: [1\n", r"run.yaml:2: not valid YAML"),
        ("seed: 1\nseed: 2\n", r"run.yaml:2: not valid YAML: found duplicate key seed"),
        ("- 1\n", r"run.yaml:1: expected `key: value` lines, found list"),
        ("actor: &a {ref: *a}\n", r"run.yaml: nested without end: does an alias"),
        ("word\n", r"run.yaml:1: expected `key: value` lines"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            load_config_file(write(tmp_path, text), [], GRPOConfig)
    with pytest.raises(ConfigError, match=r"absent.yaml does not exist: check --config"):
        load_config_file(tmp_path / "absent.yaml", [], GRPOConfig)
    for argv in ([], ["--config"], ["seed=1"]):
        with pytest.raises(ConfigError, match="give --config FILE"):
            load_config(argv, GRPOConfig)
    assert len(problems_of(tmp_path, "")) == 2


def test_resolved_yaml_reads_back_equal(tmp_path):
    config = load(
        tmp_path,
        "ref: {path: base}\nvalid_dataset: {path: v, system_prompt: 'a: b\n c'}\nlauncher: {env: {A: '1'}}\n",
        *("seed=3", "actor.optimizer.lr=3e-7", "gconfig.stop=['\\n']", "actor.adv_norm={mean: batch}"),
        *(r"train_dataset.prompt_template=It costs \${prompt}", "server.args={compilation-config.level: 3}"),
    )
    assert config.train_dataset.prompt_template == "It costs ${prompt}"
    assert config.server.args == {"compilation-config.level": 3}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config_file(tmp_path / "again.yaml", [], GRPOConfig) == config


def test_explain_documents_every_value(tmp_path):
    rows = explain(load(tmp_path, "", "seed=9"))
    table = {key: (value, doc) for key, value, doc in rows}
    assert table["seed"] == (9, "seed of data order and sampling; at least 0, at most 1e+18")
    assert table["actor.optimizer.lr"][0] == 1e-6
    assert table["ref"][0] is None
    assert all(doc for _, _, doc in rows)


@dataclass
class MyConfig(GRPOConfig):
    """A script's own fields."""

    num_hints: int = setting(2, "hints per prompt", low=0)
    plain: float = 0.5
    either: int | list[str] = 1
    name: str = field(kw_only=True)


def test_a_script_may_extend_the_configuration(tmp_path):
    path = write(tmp_path, MINIMAL + "num_hints: 3\n")
    with pytest.raises(ConfigError, match="default: name is missing, expected text"):
        load_config_file(path, [], MyConfig)
    path.write_text(path.read_text() + "name: mine\n")
    config = load_config_file(path, ["plain=0.25", "either=[a]", "actor.seed=${num_hints}"], MyConfig)
    assert (config.num_hints, config.plain, config.either, config.tokenizer_path) == (3, 0.25, ["a"], "model")
    with pytest.raises(
        ConfigError, match="2 problems .*\n.*num_hints is -1, expected at least 0\n.*either is 0.5, exp"
    ):
        load_config_file(path, ["num_hints=-1", "either=0.5"], MyConfig)


@pytest.mark.parametrize("name", ["quickstart", "gsm8k_grpo"])
def test_the_examples_load(name, repository):
    load_config_file(repository / "examples" / "arealite" / f"{name}.yaml", [], GRPOConfig)


def test_loading_needs_no_torch():
    script = "import sys, arealite.api.load_config; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == ["False", "False"]
