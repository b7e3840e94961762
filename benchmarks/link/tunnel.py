"""Two gloo ranks on a link of a given rate and latency: real TCP between network namespaces (Linux, as root).

Each rank runs in a network namespace of its own, whose only way out is a TUN device. A process carries packets between
the two devices: each direction sends one packet at a time at the link's rate, and every packet arrives the latency
later. So gloo's own messages, its acknowledgements and TCP's take the time that they take on such a link.
"""

from __future__ import annotations

import collections
import ctypes
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["on_slow_link"]

_ADDRESSES = "10.77.0.1", "10.77.0.2"
_PORT = 29_777
_MTU = 9_000
_WINDOW = 1 << 20
"""Of TCP: several times what is under way on 1 Gbit/s with 2 ms, and little enough not to wait for longer than TCP's
least timeout on 100 Mbit/s, where it would send again what is only late.
"""

_NEW_NETWORK, _SET_DEVICE, _TUN, _NO_HEADER = 0x40000000, 0x400454CA, 0x0001, 0x1000
_DEVICE = "tun0"


def on_slow_link(mbit: float, latency_ms: float, body: Callable[..., Any], *args: Any) -> Any:
    """Run ``body(rank, *args)`` on two gloo ranks; rank 0's result, which travels through JSON.

    Args:
        mbit: megabits per second in each direction.
        latency_ms: milliseconds from one rank to the other.
        body: run by each rank.
        args: of the body.
    """
    context: Any = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        devices: list[int] = [-1, -1]
        ranks: list[Any] = [context.Process(target=_rank, args=(rank, folder, body, args)) for rank in (0, 1)]

        def begin(rank: int) -> None:
            devices[rank] = _device(_ADDRESSES[rank])
            ranks[rank].start()

        for rank in (0, 1):  # a namespace belongs to the thread that made it and to what that starts
            thread = threading.Thread(target=begin, args=(rank,))
            thread.start()
            thread.join()
        for source, target in (devices, devices[::-1]):
            threading.Thread(target=_carry, args=(source, target, mbit, latency_ms), daemon=True).start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit("a rank failed")
        return json.loads(Path(folder, "result.json").read_text())


def _device(address: str) -> int:
    """Move this thread to a new network namespace with a TUN device; the file descriptor of that."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
        sys.exit(f"no network namespace ({os.strerror(ctypes.get_errno())}): run this as root on Linux")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _SET_DEVICE, struct.pack("16sH", _DEVICE.encode(), _TUN | _NO_HEADER))
    for line in (
        f"ip address add {address}/24 dev {_DEVICE}",
        f"ip link set {_DEVICE} mtu {_MTU} txqueuelen 100000 up",
        "ip link set lo up",
    ):
        subprocess.run(line.split(), check=True)
    for buffer in ("tcp_rmem", "tcp_wmem"):  # of this namespace
        Path("/proc/sys/net/ipv4", buffer).write_text(f"4096 131072 {_WINDOW}")
    return device


def _carry(source: int, target: int, mbit: float, latency_ms: float) -> None:
    """Carry the packets of one direction."""
    waiting: collections.deque[tuple[float, bytes]] = collections.deque()
    came = threading.Semaphore(0)

    def deliver() -> None:
        while True:
            came.acquire()
            at, packet = waiting.popleft()
            pause = at - time.perf_counter()
            if pause > 0:
                time.sleep(pause)
            os.write(target, packet)

    threading.Thread(target=deliver, daemon=True).start()
    free = 0.0
    os.set_blocking(source, False)
    while True:
        try:
            packet = os.read(source, 1 << 16)
        except BlockingIOError:
            select.select([source], [], [])
            free = max(free, time.perf_counter())  # nothing was waiting, so the link was idle
            continue
        free += 8e-6 * len(packet) / mbit
        waiting.append((free + 1e-3 * latency_ms, packet))
        came.release()


def _rank(rank: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = _DEVICE
    torch.set_num_threads(1)
    store: Any = dist.TCPStore(_ADDRESSES[0], _PORT, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    result = body(rank, *args)
    dist.barrier()
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    time.sleep(0.2)
    os._exit(0)
