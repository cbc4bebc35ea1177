"""What holds the four scripts together: one skeleton, the same text for the same function, one list of requirements."""

import ast
import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("trpo_continuous", "ppo_clip_continuous", "ppo_kl_continuous", "ppo_atari")
PATHS = [ROOT / f"{name}.py" for name in SCRIPTS]
NAMES = {"Args", "Agent", "compute_gae", "collect", "update", "train", "evaluate", "save_checkpoint", "load_checkpoint"}
OWN_NAMES = {
    "trpo_continuous": {"surrogate_advantage", "mean_kl", "fisher_vector_product", "conjugate_gradient", "line_search"},
    "ppo_clip_continuous": {"clipped_surrogate"},
    "ppo_atari": {"clipped_surrogate"},
    "ppo_kl_continuous": {"kl_penalized_surrogate", "adapt_kl_coef"},
}
# What the algorithms are allowed to differ in, and what pixels and games make differ besides; everything else of one
# name is one text.
DIFFER = {"Args", "Agent", "loss_gradient", "update", "train"}
ATARI_DIFFERS = {
    "Rollout", "collect", "estimate_advantages", "make_env", "make_envs", "evaluate", "report_evaluation", "main",
}  # fmt: skip


def definitions(path):
    """{name: node} of the functions and classes at the top of a script."""
    return {n.name: n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def test_functions_of_one_name_have_one_text():
    texts = defaultdict(dict)
    for path in PATHS:
        source = path.read_text()
        for name, node in definitions(path).items():
            if path.stem == "ppo_atari" and name in ATARI_DIFFERS:
                continue
            texts[name][path.name] = ast.get_source_segment(source, node)
    shared = {name for name, versions in texts.items() if len(versions) > 1} - DIFFER
    assert {"compute_gae", "collect", "evaluate", "save_checkpoint", "load_checkpoint", "Run"} <= shared
    assert len(texts["compute_gae"]) == len(texts["Run"]) == 4
    assert [name for name in shared if len(set(texts[name].values())) > 1] == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_script_has_its_names_and_imports_no_other_script(path):
    assert NAMES | OWN_NAMES[path.stem] <= definitions(path).keys()
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert not modules & {other.stem for other in ROOT.glob("*.py")}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_argument_says_what_it_does(path):
    body = definitions(path)["Args"].body
    for field, doc in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr), ast.unparse(field)
        assert len(doc.value.value) > 20


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_scripts_own_requirements_are_those_of_requirements_txt(path):
    block = re.search(r"^# /// script$(.*?)^# ///$", path.read_text(), re.M | re.S)[1]
    metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert metadata["requires-python"] == ">=3.11"
    assert metadata["dependencies"] == [line for line in requirements if not line.startswith("pytest")]
    assert all("==" in line for line in requirements)
