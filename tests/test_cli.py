"""The command line: fast, helpful, and errors as one block; `check` tells the whole plan and starts nothing."""

import os
import subprocess
import sys

import pytest
import yaml

import arealite
from arealite.cli import main, parse


@pytest.fixture
def config_file(tmp_path, tiny_llama):
    (tmp_path / "train.jsonl").write_text('{"question": "1", "answer": "1"}\n' * 10)
    path = tmp_path / "run.yaml"
    dataset = {"path": str(tmp_path / "train.jsonl"), "batch_size": 4}
    config = {"actor": {"path": tiny_llama}, "train_dataset": dataset, "total_train_epochs": 2}
    config["cluster"] = {"fileroot": str(tmp_path / "runs"), "num_gpus_per_node": 0}
    path.write_text(yaml.safe_dump(config))
    return path


def test_help_needs_nothing_heavy_and_check_no_torch(config_file):
    code = "import sys; from arealite.cli import main\ntry: main(sys.argv[2:])\nexcept SystemExit: pass\n"
    code += "heavy = {*sys.argv[1].split()} & {*sys.modules}; assert not heavy, heavy"
    heavy = "torch transformers yaml aiohttp datasets numpy pydantic rich psutil"
    for unwanted, words, said in ((heavy, ["--help"], "prove "), ("torch", ["check", str(config_file)], "PROCESSES")):
        ran = subprocess.run([sys.executable, "-c", code, unwanted, *words], capture_output=True, text=True)
        assert ran.returncode == 0 and said in ran.stdout, ran.stderr


@pytest.mark.parametrize("words", ["", "run", "serve", "check", "prove", "fetch", "bench", "bench serve", "init"])
def test_help_fits_a_terminal_and_has_examples(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([*words.split(), "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, out.splitlines())) <= 80
    assert words in ("", "serve", "bench serve") or f"arealite {words}" in out.partition("examples:")[2]


def test_version(capsys, repository):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"arealite {arealite.__version__}\n"


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize(
    "words",
    [
        "",
        "--explain",
        "cluster.num_gpus_per_node=8 allocation_mode=native:d4+fsdp:d4",
        "cluster.num_cores_per_node=128",
    ],
)
def test_check_fits_a_terminal(words, columns, tiny_llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)
    os.symlink(tiny_llama, "m")
    (tmp_path / "rows.jsonl").write_text('{"question": "1", "answer": "1"}\n')
    (tmp_path / "run.yaml").write_text("actor: {path: m}\ntrain_dataset: {path: rows.jsonl, batch_size: 1}\n")
    assert main(["check", "run.yaml", "cluster.fileroot=/r", *words.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns, max(lines, key=len)
    assert any("peak learning rate" in line for line in lines) == (words == "--explain")


def test_init_writes_what_the_documents_name(tmp_path, capsys, repository, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    source = repository / "examples" / "arealite"
    files = {p.relative_to(source) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    written = tmp_path / "examples" / "arealite"
    assert {p.relative_to(written) for p in written.rglob("*") if p.is_file()} == files and len(files) > 10
    assert main(["check", "examples/arealite/gsm8k_grpo.yaml"]) == 0
    assert main(["init"]) == 2 and "exists already" in capsys.readouterr().err
    assert main(["init", "elsewhere"]) == 0 and (tmp_path / "elsewhere" / "examples" / "arealite").is_dir()


def test_the_wheel_has_the_examples(repository, tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path)]
    ran = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    built = tmp_path / "lib"
    assert (built / "arealite" / "examples" / "quickstart.yaml").is_file()
    code = "from arealite.cli import main; import sys; sys.exit(main(['init', 'there']))"
    env = {**os.environ, "PYTHONPATH": str(built)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "there" / "examples" / "arealite" / "addition" / "train.jsonl").is_file()


NO_FOLDER = "unknown: no model folder with safetensors on this machine"
TOLD = {  # by overrides
    "seed=5": """seed: 5
        native:d1+fsdp:d1: servers generate while trainers train
        6 (2 x 3); each 4 prompts x 8 answers; rows: 10
        (eta + 1) x B = 2 x 4 = 8 groups
        server-0
        trainer-0
        arealite.inference.serve
        M parameters
        each trainer (1)""",
    "rollout.max_head_offpolicyness=0 total_train_steps=5": """synchronous; servers and trainers take turns
        0: every token is trained by the weights
        5 (total_train_steps), 2.0 passes""",
    "allocation_mode=native:d1|fsdp:d1 train_dataset.num_rows=5": "colocated\nrows: 5",
    "actor.dtype=float32": "--dtype float32",
    "train_dataset.batch_size=50": "train_dataset.batch_size (50) is above the number of rows (10)",
    "allocation_mode=sglang.d4p1m1+d4 weight_update=disk cluster.num_gpus_per_node=8": """as described:
        8 GPUs
        trainer-3""",
    "actor.path=smollm2-135m train_dataset.path=openai/gsm8k train_dataset.subset=main": f"""{NO_FOLDER}
        arealite fetch smollm2-135m
        unknown: 2 passes over the data""",
    "actor.kl_weight=0.1 ref.path=smollm2-135m": NO_FOLDER,
}


@pytest.mark.parametrize("overrides", TOLD)
def test_check_tells_the_plan(overrides, config_file, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("AREALITE_CACHE", str(tmp_path / "empty"))
    assert main(["check", str(config_file), *overrides.split()]) == 0
    out = capsys.readouterr().out
    assert not [text for text in TOLD[overrides].split("\n") if text.strip() not in out]
    assert not (config_file.parent / "runs").exists()


@pytest.mark.parametrize("words", [["--model", "NAME"], ["--model=NAME"]])
def test_serve_takes_the_name_of_a_fetched_model(words, monkeypatch, smollm2):
    from arealite.inference import serve

    given = []
    monkeypatch.setattr(serve, "main", lambda argv: given.append(serve.parse_arguments(argv)) or 0)
    assert main(["serve", "--port", "0", *[w.replace("NAME", "smollm2-135m") for w in words], "--seed", "3"]) == 0
    assert (given[0].model, given[0].port, given[0].seed) == (smollm2, 0, 3)


def test_check_into_a_closed_pipe_ends_quietly(config_file):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "arealite.cli", "check", str(config_file)]
    ran = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_check_explains_every_field(config_file, capsys):
    assert main(["check", str(config_file), "--explain"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.partition("RUN")[0].splitlines()[1:] if line.strip()}
    assert "1e-06  (peak learning rate; at least 0)" in lines["actor.optimizer.lr"]
    assert "one of token-mean, seq-mean-token-mean, seq-mean-token-sum-norm" in lines["actor.loss_aggregation"]
    assert "at least 1e-06, at most 1)" in lines["gconfig.top_p"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "absent.yaml"], "absent.yaml"),
        (["run", "absent.py", "--config", "CONFIG"], "no training script 'absent.py'"),
        (["run", "CONFIG", "--config", "CONFIG"], "run.yaml is no Python: "),
        (["check", "CONFIG", "allocation_mode=native:d1+fsdp:d1x2"], "  native:d1+fsdp:d1x2\n                   ^"),
        (["check", "CONFIG", "seeed=2"], "seed"),
        (["check", "CONFIG", "allocation_mode=sglang:d4+fsdp:d4"], "arealite check ... cluster.num_gpus_per_node=8"),
        (
            ["check", "CONFIG", "actor.dtype=float32", "server.dtype=bfloat16"],
            "server.dtype is bfloat16 and actor.dtype",
        ),
        (["fetch", "unheard-of"], "unknown model"),
    ],
)
def test_errors_are_one_block_without_traceback(words, said, config_file, capsys):
    assert main([str(config_file) if w == "CONFIG" else w for w in words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_overrides_stand_anywhere(capsys):
    arguments = parse(["run", "train.py", "a=1", "--config", "x.yaml", "b.c=2", "allocation_mode=native:d1|fsdp:d1"])
    assert (arguments.script, arguments.config) == ("train.py", "x.yaml")
    assert sorted(arguments.overrides) == ["a=1", "allocation_mode=native:d1|fsdp:d1", "b.c=2"]
    for word in ("--unknown", "plain"):
        with pytest.raises(SystemExit) as end:
            parse(["run", "train.py", "--config", "x.yaml", word])
        assert end.value.code == 2 and word in capsys.readouterr().err
