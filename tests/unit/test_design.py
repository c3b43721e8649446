"""The rules of the design as tests: who may import what, what is never called, how large and where things are."""

import ast
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "smolray").rglob("*.py"))
JOBS = sorted((ROOT / "jobs").rglob("*.py"))
SOURCES = MODULES + JOBS
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Packages that may import ray, and single modules of others. An engine must run on a node without Ray.
RAY_IMPORTERS = {
    "cluster",
    "launch",
    "tune",
    "cli",
    "data.prepare",
    "data.prepare_jobs",
    "data.ray_context",
    "data.ray_jobs",
    "data.stream",
    "precompute.jobs",
    "inference.job",
    "serve.deployment",
}
# A setting read from the environment is read at the edge: where a process starts, or where a cloud's own convention
# says so.
# Trackers take their settings from variables of their own.
ENVIRONMENT_READERS = {"tracking", "storage", "cluster", "launch", "tune", "cli"}

# Packages by level, the lowest first. A package imports lower levels only; inside a package modules import each other
# without circles.
LEVELS = (
    ("storage",),
    ("config", "run"),
    ("hub", "pretrained", "tracking"),
    ("data", "cluster"),
    ("model",),
    ("model_card", "objectives", "planner"),
    ("engine", "evaluate", "precompute"),
    ("train", "report", "inference", "export"),
    ("launch", "serve"),
    ("tune", "web"),
    ("cli",),
    ("jobs", "__main__"),
)
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}


@cache
def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "smolray" else parts
    return ".".join(p for p in parts if p != "__init__")


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def nodes_of(path):
    return list(ast.walk(tree_of(path)))


@cache
def imports_of(path):
    """Full names of what a module imports, anywhere in it; `from a import b` is both a and a.b."""
    found = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the full name"
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def own_imports(path):
    """Modules of ours that `path` imports."""
    local = {name.removeprefix("smolray.") for name in imports_of(path) if name.startswith("smolray.")}
    return local & OWN


OWN = {name_of(path) for path in MODULES}


def package_of(name):
    return name.split(".")[0]


def in_any(name, allowed):
    """Whether a module is one of `allowed`, or inside a package of them."""
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def relative(path):
    return str(path.relative_to(ROOT))


def for_each(paths):
    """A test of one file, as one test of all files that names each file that fails it."""

    def all_of(test):
        def run():
            failed = {}
            for path in paths:
                try:
                    test(path)
                except AssertionError as error:
                    failed[relative(path)] = str(error)
            assert not failed, "\n".join(f"{name}: {told}" for name, told in failed.items())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return all_of


@for_each(SOURCES)
def test_imports_go_one_way(path):
    package = package_of(name_of(path))
    if not package:
        return  # smolray/__init__.py: the version
    assert package in LEVEL_OF, f"{relative(path)} has no level: place its package in LEVELS"
    others = {name for name in own_imports(path) if name and package_of(name) != package}
    upward = {name for name in others if LEVEL_OF[package_of(name)] >= LEVEL_OF[package]}
    assert not upward, (
        f"{relative(path)} (level {LEVEL_OF[package]}) imports its own level or a higher one: {sorted(upward)}"
    )


def test_there_are_at_most_12_levels():
    assert len(LEVELS) <= 12
    assert {package_of(name_of(path)) for path in SOURCES} - {""} == set(LEVEL_OF), (
        "LEVELS names what is there, and no more"
    )


def test_imports_have_no_circle():
    edges = {name_of(path): set(own_imports(path)) - {name_of(path)} for path in MODULES}
    while edges:
        free = {name for name, targets in edges.items() if not targets & set(edges)}
        assert free, f"these import each other: {sorted(edges)}"
        edges = {name: targets for name, targets in edges.items() if name not in free}


@for_each(MODULES)
def test_only_named_modules_import_ray_and_deepspeed(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    if not in_any(name_of(path), RAY_IMPORTERS):
        assert "ray" not in roots, "an engine must run on a node without Ray"
    if name_of(path) != "engine.zero":
        assert "deepspeed" not in roots


UNSAFE_LOADS = {
    "torch.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "torch.jit.load",
    "torch.hub.load",
}


@for_each(SOURCES)
def test_nothing_from_outside_is_run_as_code(path):
    imported = set(imports_of(path))
    assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & {
        name.split(".")[0] for name in imported
    }
    assert not UNSAFE_LOADS & imported, "imported by name, a call of it would not be seen"
    for node in nodes_of(path):
        where = f"{relative(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"eval", "exec", "compile", "os.system", "os.popen", "tempfile.mktemp"}, (
            f"{where}: {called}"
        )
        assert called not in UNSAFE_LOADS, f"{where}: {called}"
        assert called.split(".")[-1] not in {
            "extractall",
            "unpack_archive",
            "full_load",
            "full_load_all",
            "load_pickle",
        }, f"{where}: {called}"
        for keyword in node.keywords:
            risky = keyword.arg in {"trust_remote_code", "allow_pickle", "shell"} and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            )
            assert not risky, f"{where}: {keyword.arg}={ast.unparse(keyword.value)}"


@for_each(MODULES)
def test_settings_are_not_read_from_the_environment_deep_inside(path):
    if in_any(name_of(path), ENVIRONMENT_READERS):
        return
    read = [
        n.lineno
        for n in nodes_of(path)
        if isinstance(n, ast.Attribute) and ast.unparse(n) in {"os.environ", "os.getenv", "os.environb"}
    ]
    assert not read, (
        f"{relative(path)} reads the environment in lines {read}; pass it in, or name the module in "
        "ENVIRONMENT_READERS with a reason"
    )
    assert not {"os.environ", "os.getenv"} & set(imports_of(path))


@for_each(SOURCES + TESTS)
def test_files_and_functions_are_small_enough_to_hold_in_the_head(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    functions = [n for n in nodes_of(path) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == [], "longer than a screen"
    assert path.name not in {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}, "name it by its idea"


@for_each(SOURCES)
def test_modules_and_public_functions_say_what_they_do(path):
    tree = tree_of(path)
    assert not tree.body or ast.get_docstring(tree), f"{relative(path)} opens without saying what flows in and out"
    for node in tree.body:
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and not node.name.startswith("_")
            and len(node.body) > 1
        ):
            assert ast.get_docstring(node), f"{relative(path)}:{node.lineno} {node.name} has no docstring"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        (
            "smolray.cli.app",
            {"ray", "torch", "transformers", "deepspeed", "pandas", "tensorboardX", "fastapi", "uvicorn"},
        ),
        ("smolray.web.app", {"ray", "torch", "transformers", "deepspeed"}),
        ("smolray.run.status", {"ray", "torch", "transformers", "deepspeed"}),  # all that `status` and `logs` need
        # Ray Train's controller unpickles what is in it
        ("smolray.launch.entrypoint", {"ray", "torch", "transformers", "deepspeed"}),
    ],
)
def test_a_process_loads_what_it_needs_and_no_more(module, heavy):
    assert_loads([(module, heavy)])


ADAPTERS = {"peft", "bitsandbytes", "trl"}  # two seconds that only a run with adapters needs


@pytest.mark.seconds
def test_a_process_with_torch_loads_what_it_needs_and_no_more():
    """One process, from what needs least to what needs most."""
    assert_loads(
        [
            ("smolray.data.stream", ADAPTERS | {"deepspeed"}),  # every data task's process does
            # a worker that embeds does, and the index is made elsewhere
            ("smolray.inference.image_search", ADAPTERS | {"deepspeed", "faiss"}),
            ("smolray.inference.shared", ADAPTERS | {"deepspeed"}),
            ("smolray.export", ADAPTERS | {"deepspeed"}),
            ("smolray.train.worker", ADAPTERS | {"mlflow"}),
            ("smolray.engine.zero", ADAPTERS | {"mlflow"}),
        ]
    )


def assert_loads(steps):
    """Import (module, packages that must not be loaded then), one after another in a fresh process."""
    code = "import sys\n" + "\n".join(
        f"import {module}; found = {heavy} & {{m.split('.')[0] for m, loaded in sys.modules.items() if loaded}}; "
        f"assert not found, ('{module}', found)"
        for module, heavy in steps
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@for_each(SOURCES)
def test_settings_are_changed_by_replace_alone(path):
    copied = [n.lineno for n in nodes_of(path) if isinstance(n, ast.Attribute) and n.attr == "model_copy"]
    assert not copied, f"{relative(path)}:{copied}: model_copy checks nothing; use config.replace"


@for_each(SOURCES)
def test_file_names_of_a_run_are_spelt_in_one_place(path):
    names = {"config.yaml", "result.json", "events.jsonl", "report.html", "checkpoints", "predictions", "audit"}
    if name_of(path) == "run.folder":
        return
    calls = [n for n in nodes_of(path) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("join")]
    spelt = [a for c in calls for a in c.args if isinstance(a, ast.Constant) and a.value in names]
    assert not spelt, f"{relative(path)}:{spelt[0].lineno} spells {spelt[0].value!r}: take it from run/folder.py"


def names_the_method(node):
    """Whether an expression is a run's method: config.method, record["method"] or record.get("method", ...)."""
    if isinstance(node, ast.Name):
        return node.id == "method"
    if isinstance(node, ast.Attribute):
        return node.attr == "method"
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "method"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        return isinstance(node.args[0], ast.Constant) and node.args[0].value == "method"
    return False


def method_comparisons(tree):
    """The lines that compare or match a run's method."""
    for node in ast.walk(tree):
        compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        compared += [node.subject] if isinstance(node, ast.Match) else []
        if any(names_the_method(part) for part in compared):
            yield node.lineno


@for_each(SOURCES)
def test_no_file_compares_the_method_with_a_name(path):
    lines = list(method_comparisons(tree_of(path)))
    assert not lines, f"{relative(path)}:{lines}: ask config.traits (smolray/config/methods.py)"


@pytest.mark.parametrize(
    "code",
    [
        'config.method == "dpo"',
        '"dpo" != self.config.method',
        'method == "dpo"',
        'config.method in ("dpo", "sft")',
        'record["method"] == "dpo"',
        'record.get("method", "sft") == "dpo"',
        "match config.method:\n    case 'dpo':\n        pass",
    ],
)
def test_a_comparison_of_the_method_is_found(code):
    assert list(method_comparisons(ast.parse(code)))


def test_worker_settings_are_unpickled_without_importing_anything(tmp_path):
    from smolray.config import RunConfig
    from smolray.data.reader import Folders, Sidecars
    from smolray.launch.ray_train import worker_settings
    from smolray.train.task import WorkerTask

    folders = Folders("train", "validation", Sidecars("features"), Sidecars(logps="logps"))
    settings = worker_settings(RunConfig(), folders, WorkerTask.PROBE)
    assert type(settings["task"]) is str
    assert Folders.from_plain(settings["folders"]) == folders
    (tmp_path / "settings").write_bytes(pickle.dumps(settings))
    code = (
        "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')); "
        "assert not any(m.split('.')[0] == 'smolray' for m in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "settings")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_top_level_is_as_designed():
    allowed = {
        "cluster",
        "smolray",
        "jobs",
        "tests",
        "k8s",
        "README.md",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "LICENSE",
    }
    allowed |= {".ci", ".github", ".gitignore", ".rayignore", ".editorconfig", ".pre-commit-config.yaml"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: git does not know which files are tracked")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= allowed


def test_git_ignores_no_file_of_the_source():
    """A pattern without a leading slash once hid a template of the same name from every commit."""
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "cluster", "smolray", "jobs", "k8s"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: git does not know which files are ignored")
    assert [line for line in listed.stdout.splitlines() if "__pycache__/" not in line] == []
