"""`arealite eval` on tiny models with real servers: kill and resume, comparisons, what cannot be compared, a URL,
grading again; and the page in a headless browser."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.inference import LocalServer, served

from arealite.api.errors import ConfigError, RewardError
from arealite.api.types import Task
from arealite.cli import main
from arealite.evaluation.eval_command import NAMED_REWARD, parse, reward_identity
from arealite.evaluation.figures import compare, difficulties, figures, quarters, vote_of
from arealite.evaluation.page import page
from arealite.evaluation.sheet import AnswerSheet, GradedAnswer, Problem, check_comparable
from arealite.reward.named import code_of

ROOT = Path(__file__).resolve().parents[1]
REWARDS = '''"""Rewards of the tests."""
import time

def vowels(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    return float(any(letter in completion.lower() for letter in "aeiou"))

def slow(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    time.sleep(0.05)
    return vowels(prompt, completion, prompt_ids, completion_ids, answer=answer)

def picky(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    if len(completion_ids) % 2:
        raise ValueError("an odd answer")
    return 1.0
'''
SETTINGS = ["eval_gconfig.max_new_tokens=6", "server.dtype=float32", "server.max_running_requests=8",
            "server.context_length=64", "launcher.pin_cores=false"]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A folder with rewards and ten problems, of two levels."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"{i} and {i + 1} is", "answer": str(2 * i + 1), "level": i % 2} for i in range(10)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def command(place, *models, reward="vowels", out="out", n=4):
    return ["eval", *map(str, models), "--tasks", str(place / "sums.jsonl"), "--reward", f"{place}/rewards.py:{reward}",
            "--n", str(n), "--out", str(place / out), *SETTINGS]  # fmt: skip


def start(words):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", "arealite.cli", *words], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def answers_of(folder):
    lines = (folder / "answers.jsonl").read_text().splitlines() if (folder / "answers.jsonl").is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_numbers(place, folders):
    """Killed by SIGKILL in the middle: the server dies too, no answer is sampled twice, and the numbers are those of
    one that was not."""
    words = command(place, folders[0], reward="slow")
    process = start(words)
    (folder,) = [place / "out" / re.sub(r"[^\w.-]+", "-", str(folders[0])).strip("-")[-80:]]
    end = time.monotonic() + 120
    while len(answers_of(folder)) < 8:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait(30)
    before = answers_of(folder)
    assert 8 <= len(before) < 40
    with open(folder / "answers.jsonl", "a") as torn:
        torn.write('{"problem": "sums/r')
    again = start(words)
    told = again.communicate(timeout=120)[0]
    assert again.returncode == 0, told
    after = answers_of(folder)
    assert after[: len(before)] == before and len(after) == 40
    assert len({(a["problem"], a["sample"]) for a in after}) == 40
    assert main(command(place, folders[0], reward="slow", out="straight")) == 0
    one, other = result_of(folder), result_of(place / "straight" / folder.name)
    assert one == other and one["results"][0]["num_answers"] == 40
    assert "report.html" in told and re.search(r"pass@4 +│ +[01]\.\d+ \[", told)
    assert main(words) == 0 and len(answers_of(folder)) == 40  # everything is there: no server is started
    assert (folder / "logs" / "server-0.log").read_text().count("=== ") == 2


def test_two_models_are_compared_and_only_what_is_comparable(place, folders, capsys):
    assert main([*command(place, *folders, n=3), "--until-decided"]) == 0
    told = capsys.readouterr().out
    assert "verdict: " in told and "of 60 answers" in told and "level 0" in told
    sheets = sorted(p.parent for p in (place / "out").glob("*/answers.jsonl"))
    (both,) = (place / "out").glob("*--*")
    found = result_of(both)["comparison"]
    assert 1 <= found["look"] <= found["num_looks"] == 1 and found["num_answers"] == 60
    assert set(found["by_difficulty"]) == {"level 0", "level 1"} and set(found["pass_at"]) == {"1", "2", "3"}
    # Stored answers need no server; the sampled difference of means is what their files say.
    num_lines = sum(len(answers_of(sheet)) for sheet in sheets)
    assert main(["eval", *map(str, sheets)]) == 0
    assert sum(len(answers_of(sheet)) for sheet in sheets) == num_lines
    means = [sum(a["reward"] for a in answers_of(s)) / 30 for s in sheets]
    stored = result_of(sheets[-1].parent / f"{sheets[0].name}--{sheets[1].name}")["comparison"]
    assert stored["difference"]["mean"] == pytest.approx(means[1] - means[0])
    # Another temperature, another reward, other tasks: named, and refused before a server is started.
    other = command(place, folders[1], str(sheets[0]), out="hot")
    assert main([*other, "eval_gconfig.temperature=0.5"]) == 2
    assert "sampling.temperature: 0.5 and 1.0" in capsys.readouterr().err
    assert main(command(place, folders[1], str(sheets[0]), out="graded", reward="slow")) == 2
    assert re.search(r"reward.name: '\S+/rewards.py:slow' and '\S+/rewards.py:vowels'", capsys.readouterr().err)
    (place / "sums.jsonl").write_text('{"prompt": "another", "answer": "1"}\n')
    assert main(command(place, folders[1], str(sheets[0]), out="tasks")) == 2
    told = capsys.readouterr().err
    assert "tasks.sums" in told and "chat template" in told
    assert not list(place.glob("graded/*/logs")) and not list(place.glob("tasks/*/logs"))
    # The folder of another evaluation is not gone on with.
    assert main(command(place, folders[0])) == 2
    assert "has the answers of another evaluation" in capsys.readouterr().err


def test_a_running_server_is_asked_by_its_url(place, folders, capsys):
    server = LocalServer(served(folders[0]))
    try:
        words = command(place, server.url, n=2)
        assert main([*words, f"tokenizer_path={folders[0]}"]) == 0
    finally:
        server.close()
    (folder,) = (place / "out").glob("*/identity.json")
    identity = json.loads(folder.read_text())
    assert identity["server"] == "remote" and identity["model"] == server.url
    assert len(answers_of(folder.parent)) == 20
    assert {tuple(a["versions"]) for a in answers_of(folder.parent)} == {(0,)}
    # The prompts of a run's configuration, its held-out tasks and its sampling.
    train, valid = (
        {"path": "unused", "prompt_template": "Add: {prompt}"},
        {"path": f"{place}/sums.jsonl", "num_rows": 3},
    )
    run = {"train_dataset": train, "valid_dataset": valid, "actor": {"path": "x"}, "eval_gconfig": {"temperature": 0.5}}
    (place / "run.yaml").write_text(json.dumps(run))
    words = command(place, folders[1], n=2, out="configured")
    del words[words.index("--tasks") : words.index("--tasks") + 2]
    assert main([*words, "--config", str(place / "run.yaml")]) == 0
    (folder,) = [p.parent for p in (place / "configured").glob("*/identity.json")]
    prompts = [json.loads(line)["prompt_text"] for line in (folder / "problems.jsonl").read_text().splitlines()]
    assert prompts == [f"Add: {i} and {i + 1} is" for i in range(3)] and len(answers_of(folder)) == 6
    assert json.loads((folder / "identity.json").read_text())["sampling"]["temperature"] == 0.5
    assert main(command(place, "127.0.0.1:1")) == 2
    assert "does not answer as an inference server does" in capsys.readouterr().err


def test_stored_answers_are_graded_again_without_sampling(place, folders, capsys):
    assert main(command(place, folders[0], n=2)) == 0
    (folder,) = [p.parent for p in (place / "out").glob("*/answers.jsonl")]
    before = answers_of(folder)
    assert main(["eval", "reverify", str(folder)]) == 0
    assert "0 of 20 answers have another reward than before" in capsys.readouterr().out
    assert main(["eval", "reverify", str(folder), "--reward", f"{place}/rewards.py:picky"]) == 0
    told, after = capsys.readouterr().out, answers_of(folder)
    assert re.search(r"\d+ of 20 answers have another reward", told)
    assert [(a["problem"], a["sample"], a["text"]) for a in after] == [
        (a["problem"], a["sample"], a["text"])
        for a in sorted(before, key=lambda a: (int(a["problem"][6:]), a["sample"]))
    ]
    for answer in after:
        is_odd = len(answer["token_ids"]) % 2
        assert answer["reward"] == (None if is_odd else 1.0) and ("odd answer" in answer["error"]) == bool(is_odd)
    assert result_of(folder)["results"][0]["num_reward_errors"] == sum(a["reward"] is None for a in after)
    assert answers_of(folder.parent / folder.name) != before
    assert [json.loads(line) for line in (folder / "answers.1.jsonl").read_text().splitlines()] == before
    assert AnswerSheet(folder).identity["reward"]["name"].endswith("rewards.py:picky")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--n", "0"], "--n is 0"),
        (["--until-decided"], "give a second one"),
        (["b", "c"], "expected one or two models"),
    ],
)
def test_command_lines_that_make_no_sense(words, told, capsys):
    with pytest.raises(SystemExit):
        parse(["a", *words])
    assert told in capsys.readouterr().err


def test_what_is_missing_is_named_before_anything_starts(place, folders, capsys):
    for words, told in (
        ([str(folders[0])], "no tasks"),
        ([str(folders[0]), "--tasks", str(place / "sums.jsonl")], "nothing says how to grade"),
        ([str(folders[0]), "--tasks", str(place / "sums.jsonl"), "--reward", "json:nothing"], "no function 'nothing'"),
        ([str(place), "--tasks", str(place / "sums.jsonl"), "--reward", "json:dumps"], "no tokenizer can be read"),
        ([*command(place, folders[0])[1:], "eval_gconfig.temperature=0"], "all answers of a group would be equal"),
        (["reverify", str(place)], "holds no evaluation"),
    ):
        assert main(["eval", *words]) == 2
        assert told in capsys.readouterr().err, words


# -- sheets without a server ------------------------------------------------------------------------------------------


def sheet_of(folder, rewards, texts=None, **identity):
    """A sheet with these rewards, a list per problem."""
    sheet = AnswerSheet(folder)
    tasks = [Task(f"d/r{i}", prompt=f"question {i}", answer="5", extras={"difficulty": i}) for i in range(len(rewards))]
    sheet.begin(
        {"model": folder.name, "tasks": {"d": "1"}, "prompts": "1", "sampling": {"top_p": 1.0}, "reward": "a:b"}
        | identity,
        [Problem(task, "d", f"<user>{task.prompt}", [1]) for task in tasks],
    )
    for i, of_problem in enumerate(rewards):
        for sample, reward in enumerate(of_problem):
            text = texts[i][sample] if texts else f"it is {int(5 * (reward or 0))}"
            error = "why" if reward is None else ""
            sheet.add(GradedAnswer(f"d/r{i}", sample, text, [1] * (1 + sample), "stop", reward, error=error))
    sheet.end()
    return sheet


def test_errors_are_not_zeros_and_votes_are_counted(tmp_path):
    sheet = sheet_of(tmp_path / "a", [[1.0, 1.0, 0.0, None], [0.0, 0.0, 1.0, 0.0], [None] * 4])
    found = figures(sheet, {}, quarters([1, 2, 3, 4]), None)
    assert found["mean_reward"]["mean"] == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert (found["num_problems"], found["num_problems_graded"], found["num_reward_errors"]) == (3, 2, 5)
    assert found["pass_at"][1]["num_problems"] == 2 and found["pass_at"][4]["num_problems"] == 1
    assert found["majority_at"][2]["mean"] == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert found["majority_at"][4]["mean"] == 0.0  # of the second problem, whose 3 of 4 votes are wrong
    assert sum(part["num_answers"] for part in found["by_length"].values()) == 7
    with pytest.raises(RewardError, match="none of the answers of b has a reward; the first: why"):
        figures(sheet_of(tmp_path / "b", [[None]]), {}, [], None)


def test_votes_are_for_answers_numbers_by_their_value():
    texts = [
        "it is 5",
        r"6 - 1 is \boxed{5.0}",
        "#### 10/2",
        r"\boxed{\frac{\sqrt{5}}{2}}",
        r"\boxed{\frac{1}{2}}",
        "Yes",
        "",
    ]
    votes = [vote_of(GradedAnswer("p", 0, text, [], "stop", 1.0)) for text in texts]
    assert votes == ["5", "5", "5", r"\frac{\sqrt{5}}{2}", "1/2", "yes", ""]


def test_difficulty_is_a_column_or_the_first_models_pass_rate(tmp_path):
    sheet = sheet_of(tmp_path / "a", [[0.0], [0.5], [1.0]] + [[0.25]] * 9)
    by_column = difficulties(sheet.problems, None, {})
    assert len(by_column) == 4 and sum(map(len, by_column.values())) == 12  # twelve numbers, in quarters
    with pytest.raises(ConfigError, match="--difficulty is color, and the problems have difficulty"):
        difficulties(sheet.problems, "color", {})
    for problem in sheet.problems:
        problem.task.extras.clear()
    rates = {"d/r0": 0.0, "d/r1": 0.5, "d/r2": 1.0}
    assert difficulties(sheet.problems, None, rates) == {
        "never solved": ["d/r0"], "solved up to 50%": ["d/r1"], "solved up to 100%": ["d/r2"]
    }  # fmt: skip


def test_a_comparison_is_paired_by_problem(tmp_path):
    """Each problem a little better: told apart although the problems differ far more than the models."""
    base = [[1.0] * i + [0.0] * (16 - i) for i in range(16)]
    better = [[1.0] * (i + 1) + [0.0] * (15 - i) for i in range(16)]
    one, other = sheet_of(tmp_path / "one", base), sheet_of(tmp_path / "other", better)
    found = compare([one, other], {}, [one.graded(), other.graded()], (1, 1), 512)
    assert found.verdict == "other is better" and found.p_value < 0.001
    assert found.difference.mean == pytest.approx(1 / 16) and found.difference.low > 0
    back = compare([other, one], {}, [other.graded(), one.graded()], (1, 1), 512)
    assert back.verdict == "other is better" and back.difference.mean == -found.difference.mean
    same = compare([one, one], {}, [one.graded(), one.graded()], (2, 6), 512)
    assert same.verdict.startswith("not decided") and same.difference.low < 0 < same.difference.high
    with pytest.raises(ConfigError, match=r"sampling.top_p: 1.0 and 0.9"):
        check_comparable(one, sheet_of(tmp_path / "third", base, sampling={"top_p": 0.9}))


def test_a_sheet_is_one_evaluations_at_a_time(tmp_path):
    sheet = sheet_of(tmp_path / "a", [[1.0]])
    other = AnswerSheet(tmp_path / "a")
    sheet.begin(sheet.identity, sheet.problems)
    with pytest.raises(ConfigError, match="in use by another"):
        other.begin(sheet.identity, sheet.problems)
    sheet.end()
    other.begin(sheet.identity, sheet.problems)
    other.end()
    (tmp_path / "a" / "problems.jsonl").write_text("no json\n")
    with pytest.raises(ConfigError, match="holds no evaluation that can be read"):
        AnswerSheet(tmp_path / "a")


VERIFIER = """
def right(prompt, completion, prompt_ids, completion_ids, **row):
    from half_of_rows import half
    return half()
"""


def test_changed_code_of_what_the_rows_name_voids_stored_answers(tmp_path):
    (tmp_path / "verifier_of_rows.py").write_text(VERIFIER)
    (tmp_path / "half_of_rows.py").write_text("def half(): return 0.5")
    row = Task("d/r0", extras={"verifier": f"{tmp_path}/verifier_of_rows.py:right"})
    sheet, problems = AnswerSheet(tmp_path / "a"), [Problem(row, "d", "", [])]
    for _ in range(2):
        sheet.begin({"reward": reward_identity(NAMED_REWARD, problems)}, problems)
        sheet.end()
    (tmp_path / "half_of_rows.py").write_text("def half(): return 1.0")
    with pytest.raises(ConfigError, match=r"another evaluation: reward.code: '\w+' and '\w+'\. .*reverify"):
        sheet.begin({"reward": reward_identity(NAMED_REWARD, problems)}, problems)
    with pytest.raises(ConfigError, match="column `verifier`"):
        reward_identity(NAMED_REWARD, [Problem(Task("d/r0"), "d", "", [])])


def test_the_code_of_a_reward_is_all_that_it_imports_but_libraries():
    found = code_of("arealite.reward.math:math_reward")
    names = ("math", "equality", "extraction", "formulas", "number", "weighted")
    assert {f"arealite.reward.{name}" for name in names} <= set(found)
    assert all(name.startswith("arealite.") for name in found) and "arealite.reward.pool" not in found


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror="document.title=\'broken\'">&amp;<!--<b>'


def test_the_page_shows_everything_in_a_browser_and_runs_nothing_of_the_answers(tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no headless browser: install one of {', '.join(BROWSERS)} (Debian: apt-get install chromium)")
    texts = [[HOSTILE, "wrong \u2028 answer"], [f"{HOSTILE} 5", "it is 5"]]
    one = sheet_of(tmp_path / "one", [[0.0, 0.0], [1.0, None]], texts)
    other = sheet_of(tmp_path / "<i>other", [[1.0, 0.0], [1.0, 1.0]], texts)
    groups = {HOSTILE: ["d/r0"], "hard": ["d/r1"]}
    comparison = compare([one, other], groups, [one.graded(), other.graded()], (1, 1), 8)
    html = page(
        [one, other], [figures(sheet, groups, quarters([1, 2]), None) for sheet in (one, other)], comparison, None
    )
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", html)
    (tmp_path / "report.html").write_text(html, encoding="utf-8")

    def shown(part=""):
        ran = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path / 'report.html'}{part}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return ran.stdout

    dom = shown("#wrong-open")
    assert "<title>Evaluation of one and &lt;i&gt;other</title>" in dom
    body = dom[: dom.index('<script type="application/json"')]
    assert "<img" not in dom and "<b>" not in body and "&lt;/script&gt;&lt;script&gt;document.title" in body
    assert body.count("<svg") == 4 and body.count("<polyline") == 2 * 2 + 2 and body.count("<rect") >= 4
    assert "1 of 1 problems that fit, of 2" in body  # of the second, no answer is wrong
    assert body.count('<pre class="wrong">') == 3 and body.count('<pre class="right">') == 1
    assert comparison.verdict in body and "mean reward" in body
    errors = shown("#error-open")
    assert "1 of 1 problems that fit" in errors and "not graded" in errors and "why" in errors
    assert shown().count("<details>") == 2


def test_failures_of_all_answers_end_with_the_first_error(place, folders, capsys):
    words = [word for word in command(place, folders[0], n=1) if not word.startswith("eval_gconfig")]
    assert main([*words, "eval_gconfig.max_new_tokens=60"]) == 2
    assert "none of 10 answers" in (told := capsys.readouterr().err) and "more than the context of 64" in told
