"""What holds the four scripts together: one skeleton, the same text for the same function, one list of requirements."""

import ast
import re
import tomllib
from collections import defaultdict

import pytest
from helpers import ROOT, SCRIPTS, each_of_four

NAMES = "Args Agent compute_gae collect update train evaluate save_checkpoint load_checkpoint".split()
OWN_NAMES = {
    "trpo_continuous": "surrogate_advantage mean_kl fisher_vector_product conjugate_gradient line_search",
    "ppo_clip_continuous": "clipped_surrogate",
    "ppo_kl_continuous": "kl_penalized_surrogate adapt_kl_coef",
    "ppo_atari": "clipped_surrogate",
}
# What the algorithms may differ in, and what pixels make differ besides; everything else of one name is one text.
DIFFER = {"Args", "Agent", "update", "compute_gradient", "train", "check_args"}
ATARI_DIFFERS = {"Rollout", "collect", "estimate_advantages", "make_envs", "make_env", "evaluate"}


def source_of(script):
    return (ROOT / f"{script.__name__}.py").read_text()


def definitions(script):
    """{name: node} of the functions and classes at the top of a script."""
    return {n.name: n for n in ast.parse(source_of(script)).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def test_functions_of_one_name_have_one_text():
    texts = defaultdict(list)
    for script in SCRIPTS:
        for name, node in definitions(script).items():
            if name not in DIFFER | (ATARI_DIFFERS if script.SCRIPT == "ppo_atari" else set()):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                texts[name].append(source_of(script).splitlines()[first - 1 : node.end_lineno])
    assert {len(texts[name]) for name in ("compute_gae", "Run", "save_checkpoint", "load_checkpoint", "main")} == {4}
    assert {len(texts[name]) for name in ("collect", "evaluate", "RunningMeanStd", "RewardScaler")} == {3}
    assert [name for name, versions in texts.items() if any(x != versions[0] for x in versions)] == []


@each_of_four
def test_a_script_has_its_names_and_imports_no_other_script(script):
    assert script.SCRIPT == script.__name__  # the file's
    assert {*NAMES, *OWN_NAMES[script.SCRIPT].split()} <= definitions(script).keys()
    imported = re.findall(r"^\s*(?:import|from) (\w+)", source_of(script), re.M)
    assert "torch" in imported and not {other.SCRIPT for other in SCRIPTS} & {*imported}


@each_of_four
def test_every_argument_says_on_its_line_what_it_does_and_so_does_help(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in definitions(script)["Args"].body:
        line = source_of(script).splitlines()[field.lineno - 1]
        comment = line.split("  # ")[1]
        assert field.end_lineno == field.lineno and len(comment) > 20 and " ".join(comment.split()) in shown, line


@each_of_four
def test_a_script_lists_what_it_needs_as_requirements_txt_pins_it(script):
    block = re.search(r"^# /// script$(.*?)^# ///$", source_of(script), re.M | re.S)[1]
    metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    listed, requirements = metadata["dependencies"], (ROOT / "requirements.txt").read_text().split()
    assert metadata["requires-python"] == ">=3.11" and all("==" in line for line in requirements)
    assert set(listed) <= {*requirements, *(line.replace("[mujoco]", "") for line in requirements)}
    imported = {"torch", "gymnasium", "numpy", "tyro", "tensorboard", "tqdm", "moviepy"}
    own = {"ale-py", "opencv-python-headless"} if script.SCRIPT == "ppo_atari" else {"gymnasium[mujoco]", "mujoco"}
    assert {line.split("==")[0] for line in listed} == (imported - {re.sub(r"\[.*", "", name) for name in own}) | own
