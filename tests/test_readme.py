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
sys.path += [str(ROOT / "benchmark"), str(ROOT / "docs")]

import lines  # noqa: E402
import peers  # noqa: E402
import plot  # noqa: E402
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
    foreign = {"help", "logdir", "cleanrl"}
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


@pytest.mark.parametrize("page", lines.PAGES)
def test_links_to_a_function_lead_to_its_lines(page):
    """In the table "From the equation to the line" every function is such a link."""
    text = (ROOT / page).read_text()
    assert lines.with_lines(text, page.count("/")) == text, "run python docs/lines.py"
    if page == "README.md":
        table = text[text.index("| what | where in the papers | function |") : text.index("## Six departures")]
        last_cells = [row.split(" | ")[-1] for row in table.strip().splitlines()[2:]]
        assert len(last_cells) > 12 and all(lines.LINK.search(cell) for cell in last_cells)
        first, last = lines.places("trpo_continuous.py")["line_search"]
        of_lines = (ROOT / "trpo_continuous.py").read_text().splitlines()[first - 1 : last]
        assert of_lines[0] == "def line_search(" and of_lines[-1].startswith("    return Step(theta_old")


def script_arguments(command):
    """(name of one of SCRIPTS, its arguments) of a command line."""
    words = shlex.split(command.split("#")[0])
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[script].removesuffix(".py"), [word for word in words[script + 1 :] if word != "--help"]


@pytest.mark.parametrize("page", ["README.md", "benchmark/table1.md"])
def test_every_command_parses(page):
    text = (ROOT / page).read_text()
    commands = [c for c in re.findall(r"(?:^    |`|&& )((?:\S*/)?python \w+\.py[^`\n]*)", text, re.M) if "..." not in c]
    commands += re.findall(r"uv run (\w+\.py[^`\n]*)", text)
    for script, arguments in map(script_arguments, commands):
        tyro.cli(SCRIPTS[script].Args, args=arguments)
    assert len(commands) >= (4 if page == "README.md" else 1)


def test_every_reported_command_parses():
    """One of each algorithm that summary.csv has: the others differ in the task and the seed."""
    commands = {algorithm: runs[0]["command"] for (algorithm, _), runs in plot.summary().items()}
    for command in commands.values():
        if "benchmark/" not in command:
            script, arguments = script_arguments(command)
            tyro.cli(SCRIPTS[script].Args, args=arguments)
    assert len(commands) > 4


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
