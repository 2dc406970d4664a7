"""`arealite eval`: how good a model is at data sets, or which of two is better; and stored answers graded again.

Called by cli.py, which brings the workflow that answers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from arealite.api.atomic import read_jsonl, write_json, write_text
from arealite.api.cli_args import DatasetConfig, GRPOConfig
from arealite.api.errors import ConfigError, RewardError
from arealite.api.load_config import Reader, load_config_file
from arealite.api.paths import expand
from arealite.api.protocols import RolloutWorkflow
from arealite.api.types import Task, as_record
from arealite.dataset.catalog import entry_of
from arealite.dataset.loader import load_tasks, load_tokenizer
from arealite.dataset.prompts import prompt_of
from arealite.evaluation.asking import AskedModel, describe_server
from arealite.evaluation.figures import (
    Comparison,
    compare,
    difficulties,
    figures,
    lengths_of,
    mean_of,
    mean_rewards,
    paired,
    quarters,
    table,
    told,
)
from arealite.evaluation.page import Among, page
from arealite.evaluation.sheet import (
    AnswerSheet,
    GradedAnswer,
    Problem,
    by_problem,
    check_comparable,
    digest,
    weights_of,
)
from arealite.evaluation.statistics import is_decided, looks, order
from arealite.models.fetch import resolve_model
from arealite.observe.progress import show, terminal_width
from arealite.observe.reasons import last_line
from arealite.observe.run_folder import RunFolder
from arealite.reward.named import code_of, find_reward
from arealite.reward.pool import RewardFunction, RewardPool

OVERRIDE = re.compile(r"[a-z_][\w.]*=")
ADDRESS = re.compile(r"https?://\S+|[\w.-]+:\d+|\[[\da-fA-F:]+\]:\d+")
NO_TERMINAL_WIDTH = 100
DEFAULTS = ("server.deterministic=true", "rollout.max_concurrent_rollouts=256")  # where nobody says otherwise
NAMED_REWARD = "arealite.reward.named:named_reward"  # as the data sets say
MAX_CHANGES_SHOWN = 10
END = """examples:
  arealite eval smollm2-135m --tasks examples/arealite/addition/test.jsonl \\
    --reward arealite.reward.number:number_reward --n 8
  arealite eval smollm2-135m runs/quickstart/addition/checkpoints/step_000024 \\
    --config examples/arealite/quickstart.yaml --n 8 eval_gconfig.temperature=1 \\
    --reward arealite.reward.number:number_reward --until-decided
    which of two is better; ends as soon as that is clear
  arealite eval http://127.0.0.1:30000 --tasks test.jsonl --reward rewards.py:mine
    a server that runs already (built in, SGLang, vLLM)
  arealite eval runs/eval/test/one runs/eval/test/other
    answers that are there already
  arealite eval reverify runs/eval/test/one --reward rewards.py:better
    grade stored answers again, or a run's held-out ones; nothing is sampled

The same command goes on where it was stopped; no answer is sampled twice."""


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; `models` and `overrides` apart from each other."""
    parser = argparse.ArgumentParser(
        prog="arealite eval",
        description="Measure a model on data sets, or compare two: mean reward, pass@k, majority vote, with intervals.",
        epilog=END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("words", nargs="+", metavar="MODEL", help="a folder, a name, a URL, or a stored evaluation; one or two of them")
    add("--tasks", help="data sets, with commas between; default: the configuration's valid_dataset")
    add("--n", type=int, metavar="N", help="answers per problem; default: eval_gconfig.n_samples")
    add("--until-decided", action="store_true", help="of two models: stop when it is clear which is better")
    add("--config", type=expand, metavar="YAML", help="prompts, sampling and servers as in this run")
    add("--reward", metavar="MODULE:FUNCTION", help="what grades; or FILE.py:FUNCTION; default: the data set's")
    add(
        "--difficulty",
        metavar="COLUMN",
        help="of the data set; default: difficulty or level, else the first's pass rate",
    )
    add("--out", type=expand, metavar="FOLDER", help="default: cluster.fileroot/eval/TASKS")
    given = parser.parse_intermixed_args(words)
    given.overrides = [word for word in given.words if OVERRIDE.match(word)]
    given.models = [word for word in given.words if not OVERRIDE.match(word)]
    given.is_again = given.models[:1] == ["reverify"]
    given.models = given.models[given.is_again :]
    if not 1 <= len(given.models) <= (1 if given.is_again else 2):
        parser.error(
            f"expected {'a stored evaluation' if given.is_again else 'one or two models'}, found {given.models}"
        )
    if given.until_decided and len(given.models) != 2:
        parser.error("--until-decided is about which of two models is better: give a second one")
    if given.n is not None and given.n < 1:
        parser.error(f"--n is {given.n}, expected at least 1")
    return given


def main(words: list[str], make_workflow: Callable[..., RolloutWorkflow]) -> int:
    """Returns the exit code 0; what is wrong is raised as ArealiteError, or ends with argparse's message.
    `make_workflow`: workflow.rlvr.RLVRWorkflow, or what takes the same and answers with one trajectory."""
    given = parse(words)
    if given.is_again:
        reverify(Path(expand(given.models[0])), given.reward)
        return 0
    with ExitStack() as stack:
        sheets, asked = [], []
        for slot, model in enumerate(given.models):
            if not ADDRESS.fullmatch(model) and AnswerSheet.exists(stored := Path(expand(model))):
                sheets.append(AnswerSheet(stored))
                continue
            one = prepare(model, given, make_workflow, slot)
            stack.callback(one.sheet.end)
            stack.callback(one.close)
            asked.append(one)
            sheets.append(one.sheet)
        if len(sheets) == 2:
            if sheets[0].folder.resolve() == sheets[1].folder.resolve():
                raise ConfigError(f"both models are {sheets[0].name}: give another one to compare it with")
            check_comparable(*sheets)
        problems = sheets[0].problems
        difficulties(problems, given.difficulty, {})  # a column that is not there is told before anything starts
        plan = order(len(problems), num_samples_of(given, sheets, asked), seed=0)
        wanted = [(problems[i].task.id, sample) for i, sample in plan]
        comparison = answer_all(sheets, asked, wanted, given)
    report(sheets, given.difficulty, set(wanted), comparison)
    return 0


def num_samples_of(given: argparse.Namespace, sheets: Sequence[AnswerSheet], asked: Sequence[AskedModel]) -> int:
    """Answers per problem: as asked for; of stored sheets no more than they have."""
    stored = [sheet for sheet in sheets if all(one.sheet is not sheet for one in asked)]
    most = [max((len(of_problem) for of_problem in sheet.answers.values()), default=0) for sheet in stored]
    wanted = [one.num_samples for one in asked] + ([given.n] if given.n else [])
    return max(1, min([*most, *wanted]))


def answer_all(
    sheets: Sequence[AnswerSheet],
    asked: Sequence[AskedModel],
    wanted: Sequence[tuple[str, int]],
    given: argparse.Namespace,
) -> Comparison | None:
    """Have the `wanted` answers (problem, sample) given, in this order, or as many as a decision takes. Of two sheets
    returns how they compare."""
    stops = looks(len(wanted)) if given.until_decided else [len(wanted)]
    for look, stop in enumerate(stops, 1):
        for one in asked:
            one.ask(wanted[:stop])
            if not given.until_decided:
                one.close()  # its memory is the next one's
        if len(sheets) == 1:
            return None
        looked, taken = (look, len(stops)), [sheet.graded(set(wanted[:stop])) for sheet in sheets]
        if is_decided(paired(*map(mean_rewards, taken)), len(stops)):
            break
    groups = difficulties(sheets[0].problems, given.difficulty, mean_rewards(taken[0]))
    return compare(sheets, groups, taken, looked, 2 * len(wanted))


# -- what is asked ----------------------------------------------------------------------------------------------------


def prepare(
    model: str, given: argparse.Namespace, make_workflow: Callable[..., RolloutWorkflow], slot: int
) -> AskedModel:
    """Everything that is needed to ask a model, checked; nothing is started. Raises ConfigError, DatasetError."""
    remote = describe_server(url_of(model)) if ADDRESS.fullmatch(model) else None
    folder = resolve_model(remote.tokenizer if remote else model)
    configs = {name: config_of(given, folder, path) for name, path in tasks_of(given).items()}
    config = next(iter(configs.values()))
    tokenizer = load_tokenizer(config)
    reward = given.reward or NAMED_REWARD
    reward_fn = find_reward(reward)
    problems = [
        Problem(replace(task, id=f"{name}/{task.id}"), name, *prompt_of(tokenizer, task))
        for name, own in configs.items()
        for task in load_tasks(dataset_of(own), tokenizer, config.seed, reward_fn)
    ]
    sampling = {key: value for key, value in vars(config.eval_gconfig).items() if key != "n_samples"}
    by_dataset = {name: [as_record(p.task) for p in problems if p.dataset == name] for name in configs}
    server = {"dtype": config.server.dtype, "deterministic": config.server.deterministic}
    identity = {
        "model": model,
        "weights": remote.weights if remote else weights_of(folder) if Path(folder).is_dir() else folder,
        "server": "remote" if remote else server,
        "tasks": {name: digest(records) for name, records in by_dataset.items()},
        "prompts": digest([problem.prompt_text for problem in problems]),
        "sampling": sampling,
        "seed": config.seed,
        "reward": reward_identity(reward, problems),
    }
    root = Path(given.out or Path(config.cluster.fileroot) / "eval" / slug("-".join(configs)))
    sheet = AnswerSheet(root / slug(model))
    sheet.begin(identity, problems)
    workflow = make_workflow(
        reward_fn,
        replace(config.eval_gconfig, n_samples=1),
        tokenizer,
        config=config.rollout,
        context_length=config.server.context_length,
    )
    num_servers = len(given.models) if given.until_decided else 1
    return AskedModel(sheet, config, workflow, folder, remote, slot if given.until_decided else 0, num_servers)


def tasks_of(given: argparse.Namespace) -> dict[str, str]:
    """Name -> path of each data set; "" for that of the configuration."""
    if given.tasks is None:
        if not given.config:
            raise ConfigError("no tasks: give --tasks FILE, or --config with a valid_dataset")
        return {"held-out": ""}
    named: dict[str, str] = {}
    for path in filter(None, given.tasks.split(",")):
        parts = Path(path)
        name = f"{parts.parent.name}-{parts.stem}" if parts.stem in ("test", "train", "valid") else parts.stem
        named[name.strip("-") if name.strip("-") not in named else f"{name}-{len(named)}"] = path
    return named


def config_of(given: argparse.Namespace, folder: str, path: str) -> GRPOConfig:
    """The configuration of a run that would evaluate the model in `folder` on `path`."""
    file = Path(given.config or os.devnull)
    said = Reader(GRPOConfig, file, given.overrides).places
    before = [f"actor.path={folder}"] + [d for d in DEFAULTS if d.partition("=")[0] not in said]
    if not given.config:
        before.append("train_dataset.path=unused")
    if path:
        before.append(f"valid_dataset.path={path}")
        if (entry := entry_of(path)) and "test" in entry.splits and "valid_dataset.split" not in said:
            before.append("valid_dataset.split=test")
    if given.n is not None:
        before.append(f"eval_gconfig.n_samples={given.n}")
        if given.n > 1 and not given.config:
            before.append("eval_gconfig.temperature=1.0")
    # Rules between training and evaluation are no concern here.
    for key, same in (("actor.dtype", "server.dtype"), ("gconfig.max_new_tokens", "eval_gconfig.max_new_tokens")):
        if same in said and key not in said:
            before.append(f"{key}=${{{same}}}")
    if "tokenizer_path" not in said:
        before.append(f"tokenizer_path={folder}")
    return load_config_file(file, [*before, *given.overrides], GRPOConfig)


def dataset_of(config: GRPOConfig) -> DatasetConfig:
    if config.valid_dataset is None:
        raise ConfigError("the configuration has no valid_dataset: give --tasks FILE")
    return config.valid_dataset


def reward_identity(name: str, problems: Iterable[Problem]) -> dict[str, str]:
    """What a reward is known by: the name of the function, and a digest of the code that grades these problems: its
    own, or that of the functions which their rows name. Raises ConfigError."""
    place, colon, function = name.partition(":")
    full_name = f"{Path(place).resolve()}{colon}{function}" if place.endswith(".py") else name
    verifiers = {name} if name != NAMED_REWARD else {str(p.task.extras.get("verifier", "")) for p in problems}
    if "" in verifiers:
        raise ConfigError(f"{name} grades rows by their column `verifier`, which some do not have: give --reward")
    return {"name": full_name, "code": digest([code_of(verifier) for verifier in sorted(verifiers)])}


def url_of(model: str) -> str:
    return model.rstrip("/") if "://" in model else f"http://{model}"


def slug(name: str) -> str:
    """A name for a folder, with the end of `name` in it."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[-80:] or "model"


# -- what comes of it -------------------------------------------------------------------------------------------------


def report(sheets: Sequence[AnswerSheet], difficulty: str | None, among: Among, comparison: Comparison | None) -> None:
    """Table, result.json and report.html: in the sheet's folder; of two, in one beside the last. Raises OSError."""
    baseline = mean_rewards(sheets[0].graded(among)) if comparison else {}
    groups = difficulties(sheets[0].problems, difficulty, baseline)
    spans = quarters(lengths_of(sheets, among))
    results = [figures(sheet, groups, spans, among) for sheet in sheets]
    folder = sheets[-1].folder
    if comparison is not None:
        folder = folder.parent / f"{sheets[0].folder.name}--{folder.name}"
    write_json(folder / "result.json", {"results": results, "comparison": comparison and comparison.as_json()})
    write_text(folder / "report.html", page(sheets, results, comparison, among))
    console = Console(highlight=False, width=terminal_width() or NO_TERMINAL_WIDTH)
    console.print(table(results, comparison))
    if comparison is not None:
        console.print(Text(f"verdict: {comparison.words}", style="bold"))
    for path in ("result.json", "report.html"):
        console.print(Text(str(folder / path)), soft_wrap=True)


def reverify(folder: Path, reward: str | None) -> None:
    """Grade stored answers again, by `reward` or by what graded them before, and show what changed: those of an
    evaluation, which keeps the new grades; or the held-out answers of a run, whose records stay as they are. Raises
    ConfigError."""
    if not AnswerSheet.exists(folder):
        return reverify_run(RunFolder(folder), reward)
    sheet = AnswerSheet(folder)
    reward = reward or str(sheet.identity["reward"]["name"])
    reward_fn, graded_by = find_reward(reward), reward_identity(reward, sheet.problems)
    sheet.begin(sheet.identity, sheet.problems)
    try:
        stored = [(problem, answer) for problem in sheet.problems for answer in sheet.of(problem.task.id)]
        after, num_changed = graded_again(stored, reward_fn)
        if num_changed:
            sheet.regrade(after)
        sheet.set_identity({**sheet.identity, "reward": graded_by})
    finally:
        sheet.end()
    return report([sheet], None, None, None)


def reverify_run(folder: RunFolder, reward: str | None) -> None:
    """Of each evaluation of a training run. Raises ConfigError: it has none."""
    steps = sorted(folder.evaluation_dir.glob("step_*.jsonl"))
    if not steps:
        raise ConfigError(f"{folder.root} holds no evaluation: give a folder with answers.jsonl, or that of a run")
    if reward is None:
        raise ConfigError("nothing says how to grade: give --reward MODULE:FUNCTION or FILE.py:FUNCTION")
    reward_fn = find_reward(reward)
    for path in steps:
        stored = []
        for row in read_jsonl(path):
            task = Task(row["task"], prompt=row["question"], answer=row["answer"], extras=row["extras"])
            grade = (row["finish_reason"], row["reward"], row["reward_parts"], row["error"])
            answer = GradedAnswer(task.id, row["member"], row["completion"], row["token_ids"], *grade)
            stored.append((Problem(task, "held-out", row["prompt"], row["prompt_ids"]), answer))
        after, _ = graded_again(stored, reward_fn, f"{path.stem}: ")
        before = [answer for _, answer in stored]
        was, now = (told(mean_of(mean_rewards(by_problem(answers)))) for answers in (before, after))
        show(Text(f"{path.stem}: mean reward {was} before, {now} now"))


def graded_again(
    stored: Sequence[tuple[Problem, GradedAnswer]], reward_fn: RewardFunction, place: str = ""
) -> tuple[list[GradedAnswer], int]:
    """The answers with other grades, and how many are other than before, of which some are shown."""
    pool = RewardPool(reward_fn, num_workers=os.cpu_count() or 1)
    try:
        after = asyncio.run(_grade(pool, stored))
    finally:
        pool.close()
    changed = [(old, new) for (_, old), new in zip(stored, after, strict=True) if old.reward != new.reward]
    show(Text(f"{place}{len(changed)} of {len(after)} answers have another reward than before"))
    for old, new in changed[:MAX_CHANGES_SHOWN]:
        was, now = ("not graded" if a.reward is None else f"{a.reward:g}" for a in (old, new))
        text = new.error or " ".join(new.text.split())[-60:]
        show(Text(f"{old.problem} sample {old.sample}: {was} -> {now}  {text}"))
    return after, len(changed)


async def _grade(pool: RewardPool, answers: Sequence[tuple[Problem, GradedAnswer]]) -> list[GradedAnswer]:
    async def one(problem: Problem, answer: GradedAnswer) -> GradedAnswer:
        task = problem.task
        try:
            score = await pool.score(
                problem.prompt_text, answer.text, problem.prompt_ids, answer.token_ids, task.answer, task.extras
            )
        except RewardError as error:
            return replace(answer, reward=None, reward_parts={}, error=last_line(str(error)))
        return replace(answer, reward=score.reward, reward_parts=score.parts, error="")

    return await asyncio.gather(*(one(problem, answer) for problem, answer in answers))
