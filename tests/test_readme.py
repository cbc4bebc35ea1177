"""What the README names exists: functions, flags, files, commands; GitHub shows its mathematics."""

import ast
import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

import ppo_atari
import ppo_clip_continuous
import ppo_kl_continuous
import trpo_continuous

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmark"))

import peers  # noqa: E402
import run  # noqa: E402
import speed  # noqa: E402
import table1  # noqa: E402

SCRIPTS = {s.__name__: s for s in (trpo_continuous, ppo_clip_continuous, ppo_kl_continuous, ppo_atari)}
README = (ROOT / "README.md").read_text()
MATHEMATICS = re.compile(r"\$`([^`\n]+)`\$")  # GitHub's inline form in which Markdown touches nothing
CODE = re.findall(r"`([^`\n]+)`", MATHEMATICS.sub("", README))
# Words in code style that are no names of ours.
FOREIGN = {"module", "RUN_DIR", "checkpoint.pt", "args.json", "runs/", "module:Env-v0"}


def names_of_the_scripts():
    """Functions, classes, their methods, Class.method and attributes of all four scripts."""
    names = set()
    for script in SCRIPTS.values():
        for node in ast.parse(Path(script.__file__).read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
                names |= {m.name for m in node.body if isinstance(m, ast.FunctionDef)}
                names |= set(re.findall(r"(?<=self\.)\w+|(?<=register_buffer\(')\w+", ast.unparse(node)))
    return names


def test_every_function_that_the_readme_names_exists():
    words = {word.split("(")[0] for word in CODE if re.fullmatch(r"[A-Za-z_.]+(\(\w*\))?", word)}
    words = {word for word in words if not word.endswith(".py")} - FOREIGN
    assert len(words) > 20 and words <= names_of_the_scripts()


def test_every_flag_that_the_readme_names_exists():
    flags = set(re.findall(r"--([a-z][a-z0-9-]+)", " ".join(CODE)))
    fields = {field.name for script in SCRIPTS.values() for field in dataclasses.fields(script.Args)}
    foreign = {"help", "logdir"}
    assert len(flags) > 15
    assert {flag.removeprefix("no-").replace("-", "_") for flag in flags - foreign} <= fields


def test_every_file_that_the_readme_names_exists():
    files = {path for path in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in path}
    files |= set(re.findall(r'(?:src|srcset)="([^"]+)"', README)) | {
        word for word in CODE if re.fullmatch(r"\S+\.py", word)
    }
    files |= {word for word in re.findall(r"[\w/]+\.(?:py|md|txt)", README)}
    assert len(files) > 15 and {file for file in files if not (ROOT / file).exists()} == set()


PAGES = ["README.md", "benchmark/table1.md", "benchmark/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page):
    text = (ROOT / page).read_text()
    commands = [c for c in re.findall(r"(?:^    |`|&& )((?:\S*/)?python \w+\.py[^`\n]*)", text, re.M) if "..." not in c]
    commands += re.findall(r"uv run (\w+\.py[^`\n]*)", text)
    commands = [shlex.split(command.split("#")[0]) for command in commands]
    for command in commands:
        script = next(i for i, word in enumerate(command) if word.endswith(".py"))
        arguments = [word for word in command[script + 1 :] if word != "--help"]
        tyro.cli(SCRIPTS[command[script].removesuffix(".py")].Args, args=arguments)
    assert len(commands) >= (1 if page == "benchmark/table1.md" else 4)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_benchmark_parses(page):
    commands = re.findall(r"(?:^    |`)python benchmark/(\w+)\.py([^`\n]*)", (ROOT / page).read_text(), re.M)
    modules = {"run": run, "table1": table1, "speed": speed, "peers": peers}  # the others have at most a script's flags
    for name, rest in {(name, rest.split("#")[0]) for name, rest in commands if name in modules}:
        config = (tyro.conf.PositionalRequiredArgs,) if name == "speed" else ()
        args = tyro.cli(modules[name].Args, args=shlex.split(rest), config=config)
        if name == "run":
            assert set(args.algorithms) <= set(run.ALGORITHMS)
        if name == "table1":
            assert set(args.rows) <= set(table1.ROWS) and set(args.settings) <= set(table1.SETTINGS)
    assert commands


def test_the_mathematics_is_what_github_shows():
    formulas = MATHEMATICS.findall(README)
    assert len(formulas) > 20 and "$" not in MATHEMATICS.sub("", README)
    for formula in formulas:
        assert "|" not in formula, f"a bar ends the table's cell: {formula}"
        assert formula.count("{") == formula.count("}") and formula == formula.strip()
