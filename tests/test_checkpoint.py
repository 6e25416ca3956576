"""Checkpoints are complete or absent, and give back exactly what went in."""

import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from stablevelocity import checkpoint


def write(root, step, **options):
    return checkpoint.save(root, step, {"model": {"w": torch.full((3,), float(step))}}, {"note": step}, **options)


def test_state_survives_exactly():
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "numbers": [0.1, math.inf, -0.0, 10**20, True, None],
        "nested": {1: ("a", {"b": np.float32(0.5)})},
    }
    plain, tensors = checkpoint.flatten(state)
    back = checkpoint.unflatten(plain, tensors)
    assert back["numbers"] == state["numbers"]
    assert back["nested"] == {1: ("a", {"b": 0.5})}
    assert back["python"] == state["python"]
    assert back["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert torch.equal(back["torch"], state["torch"])
    assert torch.equal(back["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
    np.random.set_state(back["numpy"])  # noqa: NPY002
    assert np.array_equal(np.random.get_state()[1], state["numpy"][1])  # noqa: NPY002


def test_what_cannot_be_saved_is_named():
    with pytest.raises(TypeError, match=r"/a/0: cannot be saved: object"):
        checkpoint.flatten({"a": [object()]})


def test_save_and_load(tmp_path):
    folder = write(tmp_path, 12)
    assert folder.name == "step-00000012"
    assert checkpoint.load(folder) == (12, {"note": 12})
    assert checkpoint.load_module(folder, "model")["w"].tolist() == [12.0] * 3
    assert not list(tmp_path.glob(".writing*"))


def test_only_the_newest_are_kept_and_the_latest_is_found_by_step(tmp_path):
    for step in (2, 900, 100_000_000, 30):
        write(tmp_path, step, keep=0)
    assert checkpoint.latest(tmp_path).name == "step-100000000"
    write(tmp_path, 100_000_001, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-100000000", "step-100000001"]


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 5)
    checkpoint.save(tmp_path, 5, {}, {"note": "second"})
    assert checkpoint.load(tmp_path / "step-00000005")[1] == {"note": "second"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["no state", "half a state", "half a file", "a file less"])
def test_a_damaged_folder_is_never_a_checkpoint(tmp_path, damage):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    if damage == "no state":
        (bad / "state.json").unlink()
    elif damage == "half a state":
        (bad / "state.json").write_text((bad / "state.json").read_text()[:-9])
    elif damage == "half a file":
        os.truncate(bad / "model.safetensors", 20)
    else:
        (bad / "model.safetensors").unlink()
    assert checkpoint.latest(tmp_path) == good
    with pytest.raises(ValueError, match="expected a complete checkpoint folder"):
        checkpoint.load(bad)


def test_find(tmp_path):
    folder = write(tmp_path / "checkpoints", 7)
    assert checkpoint.find(tmp_path) == checkpoint.find(tmp_path / "checkpoints") == checkpoint.find(folder) == folder
    with pytest.raises(ValueError, match="expected a run or checkpoint folder"):
        checkpoint.find(tmp_path / "nothing")


KILLED = """
import sys, torch
from stablevelocity import checkpoint
big = {str(i): torch.zeros(200_000) for i in range(40)}
for step in range(1, 10_000):
    checkpoint.save(sys.argv[1], step, {"model": big}, {"note": step}, keep=2)
    print(step, flush=True)
"""


def test_kill_9_leaves_only_whole_checkpoints(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(3):
            process.stdout.readline()
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob(".writing-*/model.safetensors")) and time.monotonic() < deadline:
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        seen = process.stdout.read().split()
        process.wait()
    newest = checkpoint.latest(tmp_path)
    step, state = checkpoint.load(newest)
    assert step == state["note"] >= int(seen[-1] if seen else 3)
    assert len(checkpoint.load_module(newest, "model")) == 40
    write(tmp_path, step + 1)
    assert not list(tmp_path.glob(".writing*"))
