"""No file and no socket is ever unpickled: an audit hook watches every command that reads a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from faults.living import SMALL, SOURCES

WATCHED = """
import os, pickle, sys
seen, on = [], True
def hook(event, args):
    if on and event == "pickle.find_class":
        seen.append(args)
sys.addaudithook(hook)
pickle.loads(b"cbuiltins\\nlen\\n.")
assert seen.pop() == ("builtins", "len"), "the hook sees"
from shoal.cli import main
def run(*args):
    try:
        main([*args])
    except SystemExit as end:
        codes.append(end.code)
codes = []
small = sys.argv[1:]
run("train", "CartPole-v1", *small, "--algorithm.minibatch-size", "64", "--actors", "0", "--stop.updates", "2", "--run-dir", "run", "--view", "silent")
newest = max(os.listdir("run/checkpoints"))
bomb = b"cos\\nsystem\\n(S'touch exploded'\\ntR."
for name in ("learner.safetensors", "learner.json", "manifest.json", "policy/policy.safetensors"):
    path = f"run/checkpoints/{newest}/{name}"
    whole = open(path, "rb").read()
    open(path, "wb").write(bomb)
    run("show", "run")
    run("evaluate", "run", "--episodes", "1")
    open(path, "wb").write(whole)
run("resume", "run", "--stop.updates", "3", "--view", "silent")
run("evaluate", "run", "--episodes", "1")
run("replay", "run")
run("show", "run")
run("runs", ".")
import shoal
shoal.load("run").policy()
url = "file://" + os.path.abspath("store/run")
os.environ["XDG_CACHE_HOME"] = os.path.abspath("here")
run("train", "CartPole-v1", *small, "--algorithm.minibatch-size", "64", "--actors", "0", "--stop.updates", "2", "--run-dir", url, "--view", "silent")
for name in ("run.json", "run.lock", "result.json", "run.db"):
    path = f"store/run/{name}"
    whole = open(path, "rb").read() if os.path.exists(path) else b""
    open(path, "wb").write(bomb)
    run("show", url)
    open(path, "wb").write(whole) if whole else os.remove(path)
os.environ["XDG_CACHE_HOME"] = os.path.abspath("elsewhere")
run("resume", url, "--stop.updates", "3", "--view", "silent")
run("evaluate", url, "--episodes", "1")
assert seen == [], seen
assert codes == [0] * 21, codes
assert not os.path.exists("exploded")
print("nothing")
"""


def test_nothing_of_a_run_is_unpickled_whoever_reads_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *SMALL], cwd=tmp_path, env={"PYTHONPATH": ":".join(SOURCES), "PATH": "/usr/bin:/bin", "TERM": "dumb"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("nothing\n"), done.stdout[-2000:] + done.stderr[-4000:]


def test_what_is_unpickled_at_all_came_through_an_inherited_descriptor() -> None:
    """One place in the house: the user's own objects, from the user's process."""
    house = Path(SOURCES[0]) / "shoal"
    places = [
        str(path.relative_to(house))
        for path in house.rglob("*.py")
        if "pickle.load" in path.read_text() or "torch.load(" in path.read_text()
    ]
    assert places == ["supervision/zygote_main.py"]
