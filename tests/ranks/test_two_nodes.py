"""Two machines, here two network namespaces, each with an agent of torchrun and a rank; one of them dies (fault 18)."""

import contextlib
import json
import os
import signal
import subprocess
import time

import pytest
import torch
from ranks_launcher import FAULTY, ONE_THREAD, run_ranks, torchrun_command
from small_run import run_settings

from ccmim_fast.checkpoints import io

# Each node has its own maps, as is the default of several machines.
MORE = ["--train.epochs=4", "--run.save_every=1", "--run.keep=9", "--run.resume=auto", "--score.shards=2"]
MORE.append("--train.feature_images=0")  # a fault comes after so many images of steps
HELD_STEP = "8"  # of 12: checkpoints of steps 3 and 6 are there
PATIENCE = 180  # seconds, for a machine with much to do


def ip(words):
    return subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=True, timeout=30).stdout


class Node:
    """A network namespace with one interface, and what runs in it: an agent of torchrun, and this rank."""

    def __init__(self, name, rank):
        # torchrun gives ranks in the order of addresses.
        self.name, self.rank, self.address = name, rank, f"10.213.0.{rank + 1}"
        self.link, self.agent = name.replace("-", ""), None

    def launch(self, folder, host, held):
        """As on a machine of its own; the rank of `held` stops in the middle, the first time."""
        at, hosts = host.address, int(host is self)
        options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={at}:29400"]
        options += ["--rdzv-id=nodes", f"--local-addr={self.address}", "--max-restarts=3", "--monitor-interval=0.1"]
        options += [f"--rdzv-conf=is_host={hosts},keep_alive_interval=1,keep_alive_max_attempt=5"]
        command = ["ip", "netns", "exec", self.name, *torchrun_command(*options)]
        command += [FAULTY, "hold", HELD_STEP, str(held.rank), *run_settings(folder), *MORE]
        environment = {**os.environ, **ONE_THREAD, "HELD": str(folder / "held")}
        environment |= {"GLOO_SOCKET_IFNAME": self.link, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.log = folder / f"{self.link}.log"
        with self.log.open("a") as log:
            self.agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def kill(self):
        """Agent and ranks at once."""
        for pid in ip(f"netns pids {self.name}").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if self.agent is not None:
            self.agent.wait(PATIENCE)


@pytest.fixture(scope="module")
def nodes():
    """Two nodes that see each other and nothing else."""
    names = [f"cc{os.getpid()}-{letter}" for letter in "ab"]
    found = [Node(name, rank) for rank, name in enumerate(names)]
    with contextlib.ExitStack() as undo:
        try:
            for node in found:
                ip(f"netns add {node.name}")
                undo.callback(ip, f"netns delete {node.name}")
            one, other = found
            ip(f"link add {one.link} netns {one.name} type veth peer {other.link} netns {other.name}")
            for node in found:
                undo.callback(node.kill)
                ip(f"-n {node.name} address add {node.address}/24 dev {node.link}")
                for link in ("lo", node.link):
                    ip(f"-n {node.name} link set {link} up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        yield found


def wait_for(happened, *nodes):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        there = time.monotonic() < deadline and all(node.agent.poll() is None for node in nodes)
        assert there, "\n".join(node.log.read_text()[-3000:] for node in nodes)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, nodes):
    """Losses and last checkpoint of two ranks on one machine, left alone."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(2, FAULTY, "nan", "0", "none", *run_settings(folder), *MORE)
    return ended(folder)


def ended(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [(r["step"], r["recons"], r["contrast"]) for r in map(json.loads, lines) if r["kind"] == "train"]
    return losses, io.load(folder / "run" / "checkpoints" / "step_00000012")


def check_equal(one, other):
    assert [step for step, *_ in one[0]] == list(range(1, 13))
    assert one[0] == other[0]
    assert one[1]["progress"] == other[1]["progress"]
    assert torch.equal(one[1]["maps"], other[1]["maps"])
    for name, weight in one[1]["model"].items():
        assert torch.equal(weight, other[1]["model"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["guest", "host"])
def test_a_node_that_dies_and_comes_back(tmp_path, nodes, alone, dies):
    """The other one's agent waits for a guest of the rendezvous; where its host died, both are launched again."""
    host, guest = nodes
    lost, left = (guest, host) if dies == "guest" else (host, guest)
    for node in nodes:
        node.kill()  # what a test that failed may have left
        node.launch(tmp_path, host, lost)
    wait_for((tmp_path / "held").exists, *nodes)
    assert [path.name for path in io.checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step_00000003",
        "step_00000006",
    ]
    lost.kill()
    if dies == "host":
        assert left.agent.wait(PATIENCE)
        left.launch(tmp_path, host, lost)
    lost.launch(tmp_path, host, lost)
    for node in nodes:
        assert node.agent.wait(PATIENCE) == 0, node.log.read_text()[-3000:]
    check_equal(ended(tmp_path), alone)
