"""The installation tells what it holds, imports fast, and its layers depend on each other in one direction only."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stablevelocity_kernels as svk
from stablevelocity_kernels import info

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "stablevelocity_kernels"
LAYER = ROOT / "python" / "stablevelocity"


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, cwd=ROOT, check=True
    )
    return done.stdout


def test_build_info():
    built = svk.build_info()
    assert built["torch"] == torch.__version__
    if built["compiled"]:
        assert built["version"] == svk.__version__
        assert built["isa_in_use"] in built["isa_variants"]
        assert (built["cuda"] is None) == (built["cuda_architectures"] is None)
    else:
        assert "no compiled extension" in built["reason"]


def test_build_info_without_the_extension(monkeypatch, tmp_path):
    monkeypatch.setattr(info, "_C", None)
    monkeypatch.setattr(info, "_why_no_extension", "no module named _C", raising=False)
    monkeypatch.setattr(info, "_RECORD", tmp_path / "_build.json")
    assert "not built" in svk.build_info()["reason"]
    (tmp_path / "_build.json").write_text(json.dumps({"reason": "no C++ compiler was found"}))
    assert "no C++ compiler" in svk.build_info()["reason"]
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        svk.plan(1, 1, 1)


@pytest.mark.skipif(not svk.build_info()["compiled"], reason="the planner is compiled")
class TestPlan:
    @pytest.mark.parametrize("device", sorted(info.DEVICES))
    def test_every_known_device_has_a_plan(self, device):
        plan = svk.plan(256, 256, 4096, k=1001, device=device)
        assert plan["kernel"]
        assert plan["reason"]
        assert plan["smem_bytes"] <= info.DEVICES[device].smem_limit

    def test_bytes_count_every_group_once(self):
        plan = svk.plan(256, 256, 4096, k=1001, device="h100")
        assert plan["bytes"] >= 256 * 256 * 4096 * 2

    def test_refuses_what_it_does_not_know(self):
        with pytest.raises(ValueError, match="device"):
            svk.plan(1, 1, 1, device="abacus")
        with pytest.raises(ValueError, match="precision"):
            svk.plan(1, 1, 1, precision="perfect", device="h100")


def test_import_is_fast():
    code = (
        "import time, torch, numpy; start = time.perf_counter(); import stablevelocity_kernels; "
        "print(time.perf_counter() - start)"
    )
    # the first one may have to warm the disk; the others bear a busy machine
    tries = (float(run(code)) for _ in range(4))
    assert any(seconds < 0.3 for seconds in tries)


def test_import_leaves_heavy_modules_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import stablevelocity_kernels; print(set(sys.modules) - before)"
    )
    new = {name.partition(".")[0] for name in ast.literal_eval(run(code))}
    assert not new & {"triton", "diffusers", "accelerate", "matplotlib", "stablevelocity"}


def imports_of(path: Path, package_root: Path) -> set[str]:
    """Absolute dotted names of everything that a Python file imports, `from` targets included."""
    package = path.relative_to(package_root).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


STDLIB = tuple(sys.stdlib_module_names)
SHARED = tuple(f"stablevelocity_kernels.{module}" for module in ("_checks", "paths", "testing"))
LAYERS = {
    "reference": ("torch", "stablevelocity_kernels.reference", *SHARED),
    "triton": ("torch", "triton", "stablevelocity_kernels.triton", *SHARED),
    "ops": (
        "torch",
        "stablevelocity_kernels.ops",
        "stablevelocity_kernels.reference",
        "stablevelocity_kernels.triton",
        *SHARED,
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_kernel_layers_import_only_what_lies_below(layer):
    allowed = LAYERS[layer] + STDLIB
    for path in python_files(KERNELS / layer):
        for name in imports_of(path, ROOT):
            # `from .. import _checks, reference` gives the package itself plus a name
            assert within(name, allowed), f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_never_import_the_python_layer():
    for path in python_files(KERNELS):
        for name in imports_of(path, ROOT):
            assert not within(name, ("stablevelocity", "diffusers")), f"{path.relative_to(ROOT)} imports {name}"


def test_python_layer_uses_public_names_only():
    public = {f"stablevelocity_kernels.{name}" for name in [*svk.__all__, "__version__"]}
    for path in python_files(LAYER):
        for name in imports_of(path, ROOT / "python"):
            if within(name, ("stablevelocity_kernels",)):
                allowed = name == "stablevelocity_kernels" or name in public
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"
            if within(name, ("diffusers",)):
                assert LAYER / "diffusers" in path.parents, f"{path.relative_to(ROOT)} imports {name}"


def test_nothing_imports_benchmarks_or_tests():
    for folder, package_root in ((KERNELS, ROOT), (LAYER, ROOT / "python")):
        for path in python_files(folder):
            for name in imports_of(path, package_root):
                assert not within(name, ("benchmarks", "tests")), f"{path.relative_to(ROOT)} imports {name}"


def test_sources_of_an_op_include_only_their_own_folder_and_common():
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if path.parent == ROOT / "csrc":
            continue
        own = path.parent.name
        for header in re.findall(r'#include "([^"]+)"', path.read_text()):
            folder = header.partition("/")[0]
            assert folder in ({"common"} if own == "common" else {"common", own}), (
                f"{own}/{path.name} includes {header}"
            )
