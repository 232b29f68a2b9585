"""Real processes: what is killed, stopped, orphaned or lost, and that nothing is left.

Every wait has a generous limit; no speed is asserted.
"""

import ast
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest

from shoal.errors import ProcessError
from shoal.supervision import zygote
from shoal.supervision.channel import Channel, wait
from shoal.supervision.memory import SharedMemory
from shoal.supervision.processes import marked_processes, process_state, pss_bytes
from shoal.supervision.zygote import Exited, Forked, Lost, Ready, Zygote, wait_until_ready
from stopping import stop_process

LIMIT_SECONDS = 300.0
HERE = Path(__file__).parent
ROLES = "supervision_roles"


def eventually(condition, what):
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still not after {LIMIT_SECONDS} s: {what}"
        time.sleep(0.005)


def alive(pid):
    return process_state(pid) not in (None, "Z")


class Fleet:
    """A zygote, and what it told."""

    def __init__(self, log_directory, **settings):
        self.log_directory = log_directory
        self.zygote = Zygote.start(log_path=log_directory / "zygote.log", **{"payload": {}, **settings})
        self.events = []
        self.ends = []

    def until(self, kind, number=1):
        """All events of this kind so far, once there are `number` of them."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(found := [event for event in self.events if isinstance(event, kind)]) < number:
            assert time.monotonic() < deadline, f"waited for {number} {kind.__name__}, have {self.events}"
            wait([self.zygote], 0.5)
            self.events += self.zygote.receive()
        return found

    def fork(self, function, index=0, incarnation=0, memory_fds=()):
        """(pid, the supervisor's end)"""
        mine, theirs = Channel.pair()
        self.ends += [mine, theirs]
        request = self.zygote.fork(f"{ROLES}:{function}", "role", index, incarnation, theirs, memory_fds)
        assert theirs.fileno() == -1
        while True:
            for event in self.events:
                if isinstance(event, Forked) and event.request == request:
                    return event.pid, mine
            self.until(Forked, len([event for event in self.events if isinstance(event, Forked)]) + 1)

    def log(self, index=0):
        return (self.log_directory / f"role-{index}.log").read_text()

    @property
    def mark(self):
        return self.zygote._mark

    def left(self):
        return marked_processes(self.mark, self.zygote.pid)


def hear(channel):
    assert wait([channel], LIMIT_SECONDS), "no word"
    return channel.receive()


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(zygote, "SWEEP_SECONDS", LIMIT_SECONDS)  # a busy machine takes its time to bury processes
    fleets = []

    def start(**settings):
        fleets.append(Fleet(tmp_path, **settings))
        return fleets[-1]

    yield start
    for each in fleets:
        each.zygote.close(timeout_seconds=LIMIT_SECONDS)
        assert each.left() == []
        assert process_state(each.zygote.pid) is None
        for end in each.ends:
            end.close()


def test_a_role_knows_who_it_is_and_holds_nothing_of_others(fleet, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "c0ffee")
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
        monkeypatch.setenv(name, "/secrets/file")
    one = fleet(payload={"run": "r", "numbers": [1, 2]})
    others = [one.fork("echo_until_gone", index)[1] for index in range(3)]
    memory = SharedMemory.create(4096)
    pid, mine = one.fork("say_who", 7, 3, [memory.fd])
    who = ast.literal_eval(hear(mine).decode())
    assert (who["name"], who["index"], who["incarnation"]) == ("role", 7, 3)
    assert who["payload"] == {"run": "r", "numbers": [1, 2]}
    assert (who["wait_policy"], who["threads"]) == ("PASSIVE", "1")
    assert who["secrets"] == []
    assert who["group"]
    assert who["int_ignored"]
    assert who["term_default"]
    assert who["collects_garbage"]
    kinds = sorted(fd.split(":")[0] if not fd.startswith("/dev/null") else "null" for fd in who["fds"])
    log = str(one.log_directory / "role-7.log")
    assert kinds == sorted(["null", log, log, "socket", "/memfd"]), who["fds"]
    (exited,) = one.until(Exited)
    assert (exited.pid, exited.role.index, exited.exit_code, exited.describe()) == (pid, 7, 0, "exit code 0")
    assert len(others) == 3
    with pytest.raises(EOFError):
        mine.receive()


def test_what_a_role_forks_cannot_speak_for_it(fleet):
    _, mine = fleet().fork("speak_after_a_fork")
    assert hear(mine) == b"parent"


@pytest.mark.parametrize(
    ("function", "code", "text"),
    [
        ("return_three", 3, ""),
        ("exit_four", 4, ""),
        ("raise_an_error", 1, "RuntimeError: the pole fell"),
        ("no_such_function", 1, "AttributeError"),
    ],
)
def test_how_a_role_ended_is_told_and_logged(fleet, function, code, text):
    one = fleet()
    one.fork(function)
    (exited,) = one.until(Exited)
    assert exited.describe() == f"exit code {code}"
    assert text in one.log()


def test_several_memories_arrive_in_order(fleet):
    one = fleet(payload={"size_bytes": 4096})
    memories = [SharedMemory.create(4096) for _ in range(3)]
    one.fork("write_memory", 5, 0, [memory.fd for memory in memories])
    assert one.until(Exited)[0].exit_code == 0
    assert [memory.buffer.tolist() for memory in memories] == [[5 + number] * 4096 for number in range(3)]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_role_leaves_no_descendant(fleet, stopped):
    one = fleet()
    pid, mine = one.fork("breed_and_wait")
    descendants = ast.literal_eval(hear(mine).decode())
    other_pid, other = one.fork("breed_and_wait", 1)
    of_the_other = ast.literal_eval(hear(other).decode())
    if stopped:
        stop_process(pid)
    one.zygote.kill(pid)
    (exited,) = one.until(Exited)
    assert exited.pid == pid
    assert exited.describe() == "killed by SIGKILL"
    assert exited.exit_code is None
    eventually(lambda: not any(map(alive, descendants)), "descendants are gone")
    assert all(map(alive, [other_pid, *of_the_other]))
    with pytest.raises(EOFError):
        hear(mine)


def test_a_role_killed_from_outside_leaves_no_descendant(fleet):
    one = fleet()
    pid, mine = one.fork("breed_and_wait")
    descendants = ast.literal_eval(hear(mine).decode())
    os.kill(pid, signal.SIGKILL)
    assert one.until(Exited)[0].pid == pid
    eventually(lambda: not any(map(alive, descendants)), "descendants are gone")


def test_a_role_that_returns_leaves_no_descendant(fleet):
    one = fleet()
    _, mine = one.fork("breed_and_return")
    descendants = ast.literal_eval(hear(mine).decode())
    assert one.until(Exited)[0].exit_code == 0
    eventually(lambda: not any(map(alive, descendants)), "descendants are gone")


def test_kill_leaves_strangers_alone(fleet):
    one = fleet()
    stranger = subprocess.Popen(["sleep", "600"])
    one.zygote.kill(stranger.pid)
    _, mine = one.fork("echo_until_gone")
    mine.send(b"the kill was served before this")
    hear(mine)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_the_zygote_killed_takes_all_with_it_and_is_told(fleet):
    one = fleet()
    pid, mine = one.fork("breed_and_wait")
    descendants = ast.literal_eval(hear(mine).decode())
    stopped_pid, _ = one.fork("echo_until_gone", 1)
    stop_process(stopped_pid)
    os.kill(one.zygote.pid, signal.SIGKILL)
    (lost,) = one.until(Lost)
    assert "killed by SIGKILL" in lost.reason
    assert {event.pid for event in one.until(Exited, 2)} == {pid, stopped_pid}
    assert {event.describe() for event in one.until(Exited, 2)} == {"died with the helper process"}
    assert isinstance(one.events[-1], Lost)
    assert not any(map(alive, [pid, stopped_pid, *descendants]))
    assert one.zygote.fileno() == -1
    assert one.zygote.receive() == []
    with pytest.raises(ProcessError, match="start another"):
        one.fork("echo_until_gone")


def test_the_zygotes_death_is_told_also_when_its_channel_is_held_open(fleet):
    """As a role does that was stopped in the moment of its fork."""
    one = fleet(preload=["forks_a_holder"])
    one.until(Ready)
    assert len(one.left()) == 2
    os.kill(one.zygote.pid, signal.SIGKILL)
    one.until(Lost)
    assert one.left() == []


def test_roles_die_with_the_zygote_also_when_nobody_asks(fleet):
    one = fleet()
    pids = []
    for index in range(2):
        pid, mine = one.fork("echo_until_gone", index)
        mine.send(b"it runs, so it dies with its parent")
        hear(mine)
        pids.append(pid)
    stop_process(pids[1])
    os.kill(one.zygote.pid, signal.SIGKILL)
    eventually(lambda: not any(map(alive, pids)), "roles are gone")


def test_close_kills_stopped_roles_and_all_descendants(fleet):
    one = fleet()
    pids = []
    for index in range(2):
        pid, mine = one.fork("breed_and_wait", index)
        pids += [pid, *ast.literal_eval(hear(mine).decode())]
        stop_process(pid)
    one.zygote.close(timeout_seconds=LIMIT_SECONDS)
    assert not any(map(alive, pids))
    one.zygote.close()


@pytest.mark.parametrize("when", ["before it is ready", "when it is ready"])
def test_close_does_not_wait_for_a_stopped_zygote(fleet, when):
    one = fleet(preload=[] if when == "when it is ready" else ["imports_for_ever"])
    if when == "when it is ready":
        one.until(Ready)
    stop_process(one.zygote.pid)
    one.zygote.close(timeout_seconds=LIMIT_SECONDS)
    # while it imports it hears nothing, and is killed
    assert one.zygote._process.returncode == (0 if when == "when it is ready" else -signal.SIGKILL)


def test_close_ends_an_import_that_hangs(fleet):
    one = fleet(preload=["imports_for_ever"])
    one.zygote.close(timeout_seconds=0.3)
    assert process_state(one.zygote.pid) is None


def test_an_import_that_fails_is_told_with_its_traceback(fleet):
    one = fleet(preload=["no_such_module"])
    mine, theirs = Channel.pair()
    one.ends = [mine]
    one.zygote.fork(f"{ROLES}:stamp", "role", 0, 0, theirs)
    with pytest.raises(ProcessError, match="No module named 'no_such_module'"):
        wait_until_ready(one.zygote, LIMIT_SECONDS)
    assert "no_such_module" in (one.log_directory / "zygote.log").read_text()
    with pytest.raises(EOFError):
        hear(mine)


def test_a_role_asked_for_when_the_import_fails_is_told_as_exited(fleet):
    one = fleet(preload=["no_such_module"])
    one.ends = Channel.pair()
    one.zygote.fork(f"{ROLES}:stamp", "role", 4, 2, one.ends[1])
    one.until(Lost)
    (exited,) = one.until(Exited)
    assert (exited.pid, exited.role.index, exited.role.incarnation) == (0, 4, 2)


def test_threads_before_a_fork_are_told(fleet):
    one = fleet(preload=["starts_a_thread"])
    (ready,) = one.until(Ready)
    assert ready.num_threads == 2
    assert "a stray thread" in (one.log_directory / "zygote.log").read_text()


def test_a_hundred_forks_leak_no_descriptor(fleet):
    one = fleet(preload=[ROLES])
    one.until(Ready)
    memory = SharedMemory.create(4096)
    theirs_before = len(os.listdir(f"/proc/{one.zygote.pid}/fd"))
    mine_before = len(os.listdir("/proc/self/fd"))
    for index in range(100):
        _, mine = one.fork("return_three", index % 3, index, [memory.fd, memory.fd])
        mine.close()
    assert {event.exit_code for event in one.until(Exited, 100)} == {3}
    eventually(lambda: len(os.listdir(f"/proc/{one.zygote.pid}/fd")) == theirs_before, "the helper has closed all")
    assert len(os.listdir("/proc/self/fd")) <= mine_before  # what tests before this one left may go meanwhile
    assert one.zygote._living == {}
    assert one.zygote._pending == {}


def test_a_zygote_out_of_descriptors_tells_and_goes_on(fleet):
    one = fleet()
    one.until(Ready)
    limits = resource.prlimit(one.zygote.pid, resource.RLIMIT_NOFILE)
    num_open = len(os.listdir(f"/proc/{one.zygote.pid}/fd"))
    resource.prlimit(one.zygote.pid, resource.RLIMIT_NOFILE, (num_open + 2, limits[1]))
    memory = SharedMemory.create(4096)
    one.ends += (ends := Channel.pair())
    one.zygote.fork(f"{ROLES}:return_three", "role", 0, 0, ends[1], [memory.fd] * 5)
    (exited,) = one.until(Exited)
    assert exited.pid == 0
    assert "too many open files" in exited.describe()
    resource.prlimit(one.zygote.pid, resource.RLIMIT_NOFILE, limits)
    one.fork("return_three", 1)
    assert one.until(Exited, 2)[1].exit_code == 3


def test_a_lambda_runs_in_a_role(fleet):
    captured = 41
    one = fleet(pickled=cloudpickle.dumps(lambda number: number + captured))
    assert hear(one.fork("apply_pickled")[1]) == b"42"


def test_large_user_objects_arrive_whole(fleet):
    content = os.urandom(3_000_000)
    one = fleet(pickled=cloudpickle.dumps(lambda number: len(content) + sum(content[-9:]) * 0))
    assert hear(one.fork("apply_pickled")[1]) == b"3000000"


def test_messages_go_both_ways_while_others_die(fleet):
    one = fleet()
    _, mine = one.fork("echo_until_gone")
    for index in range(5):
        pid, _ = one.fork("echo_until_gone", index + 1)
        one.zygote.kill(pid)
        message = os.urandom(100_000)
        mine.send(message)
        assert hear(mine) == message
    one.until(Exited, 5)


def test_the_stack_of_a_role_is_written_to_its_log_on_demand(fleet):
    one = fleet()
    pid, mine = one.fork("echo_until_gone")
    mine.send(b"awake")
    hear(mine)
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: "in echo_until_gone" in one.log(), "the stack is in the log")
    mine.send(b"still there")
    assert hear(mine) == b"still there"


def test_memory_is_counted_and_the_dead_count_nothing(fleet):
    one = fleet()
    pid, _ = one.fork("echo_until_gone")
    assert pss_bytes([pid]) > 100_000
    assert pss_bytes([pid, one.zygote.pid]) > pss_bytes([pid])
    one.zygote.kill(pid)
    one.until(Exited)
    assert pss_bytes([pid]) == 0


SUPERVISOR = """
import os, signal, sys
sys.path.insert(0, {here!r})
from shoal.supervision.channel import Channel, wait
from shoal.supervision.zygote import Zygote
zygote = Zygote.start({{}}, log_path={log!r}, preload={preload!r})
ends = []
for index, function in enumerate(["breed_and_wait", "breed_and_wait", "echo_until_gone"]):
    mine, theirs = Channel.pair()
    zygote.fork("supervision_roles:" + function, "role", index, 0, theirs)
    ends.append(mine)
if not zygote_hangs:
    heard = [wait([end], 300) and end.receive() for end in ends[:2]]
    forked = []
    while len(forked) < 3:  # a role may speak before the helper says that it was forked
        wait([zygote], 300)
        forked += [event for event in zygote.receive() if hasattr(event, "pid")]
    os.kill(forked[1].pid, signal.SIGSTOP)
    if zygote_stopped:
        os.kill(zygote.pid, signal.SIGSTOP)
print(zygote.pid, zygote._mark, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("case", ["running", "zygote stopped", "zygote importing"])
def test_the_supervisor_killed_leaves_nothing(tmp_path, case):
    """The zygote sees the end of its parent, also when it is stopped; grandchildren, sessions of their own and stopped roles included."""
    preload = ["imports_for_ever"] if case == "zygote importing" else []
    script = SUPERVISOR.format(here=str(HERE), log=str(tmp_path / "zygote.log"), preload=preload)
    script = f"zygote_hangs, zygote_stopped = {case == 'zygote importing'}, {case == 'zygote stopped'}\n" + script
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    supervisor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environ)
    zygote_pid, mark = supervisor.stdout.readline().split()
    if case != "zygote importing":
        assert len(marked_processes(mark, int(zygote_pid))) == 1 + 3 + 6
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    eventually(lambda: marked_processes(mark, int(zygote_pid)) == [], "nothing is left")


PLAIN_SCRIPT = """
import sys
import torch
import cloudpickle
from shoal.supervision.channel import Channel, wait
from shoal.supervision.zygote import Zygote
print("main runs", flush=True)
zygote = Zygote.start({{}}, cloudpickle.dumps(lambda number: number + 41), ["torch"], log_path={log!r})
mine, theirs = Channel.pair()
zygote.fork("supervision_roles:apply_pickled", "role", 0, 0, theirs)
wait([mine], 300)
print(mine.receive().decode())
"""


def test_a_plain_script_without_main_guard_and_with_torch_imported(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PLAIN_SCRIPT.format(log=str(tmp_path / "zygote.log")))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environ, timeout=300, check=False)
    assert (ended.stdout, ended.stderr) == ("main runs\n42\n", "")
    assert (tmp_path / "zygote.log").read_text() == ""
